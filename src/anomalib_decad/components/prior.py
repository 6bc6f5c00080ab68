# SPDX-License-Identifier: Apache-2.0
"""Prior of the abnormal component of a normal patch, given its normal component."""

import logging
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from anomalib_decad.components.precision import at_least_float32, in_parts, linear_rows
from anomalib_decad.ranges import check_range

__all__ = ["ConditionalPrior"]

logger = logging.getLogger(__name__)

_SHARPNESS = 20.0  # start of beta times the mean squared distance between normal components and keys
_KMEANS_ITERATIONS = 6
# Passes over all patches and prototypes beside those of k-means. Each takes about as long as an epoch.
_OTHER_PASSES = 3
_LEARNING_RATE, _WEIGHT_DECAY = 2e-3, 1e-2


class ConditionalPrior(nn.Module):
    r"""Predicts the abnormal component of a normal patch from its normal component, :math:`z_a \approx p(z_n)`.

    A mixture over prototypes of normal patches plus what a small network adds to it:

    .. math:: p(z_n) = \sum_i w_i a_i + r(z_n), \qquad w = \mathrm{softmax}(-\beta \|z_n - k_i\|^2)

    with keys :math:`k_i`, values :math:`a_i`, the sharpness :math:`\beta` and r, a network of three linear layers, all
    learned. :meth:`fit` starts the keys as cluster centers of normal components, a value as the mean abnormal component
    of its key's cluster, and r as a regression of what the mixture leaves. Nothing of the abnormal component itself
    enters, so an anomaly in it cannot be copied.

    Args:
        num_normal (int): Channels of the normal component; at least 1.
        num_abnormal (int): Channels of the abnormal component; at least 1.
        num_prototypes (int): Number of prototypes; at least 1. Defaults to ``5120``.
        hidden_dim (int): Channels inside r; 0 leaves it out. Defaults to ``256``.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> prior = ConditionalPrior(num_normal=8, num_abnormal=24, num_prototypes=16)
        >>> prior(torch.randn(2, 100, 8)).shape
        torch.Size([2, 100, 24])
    """

    def __init__(self, num_normal: int, num_abnormal: int, num_prototypes: int = 5120, hidden_dim: int = 256) -> None:
        super().__init__()
        sizes = {"num_normal": num_normal, "num_abnormal": num_abnormal, "num_prototypes": num_prototypes}
        for name, value in sizes.items():
            check_range(value >= 1, name, "at least 1", value)
        check_range(hidden_dim >= 0, "hidden_dim", "at least 0", hidden_dim)
        self.keys = nn.Parameter(torch.randn(num_prototypes, num_normal))
        self.values = nn.Parameter(torch.zeros(num_abnormal, num_prototypes))
        self.log_beta = nn.Parameter(torch.tensor(_SHARPNESS / (2 * num_normal)).log())
        self.residual = _Network(num_normal, hidden_dim, num_abnormal) if hidden_dim else None

    def forward(self, normal: torch.Tensor) -> torch.Tensor:
        """Predict (..., num_abnormal) from normal components (..., num_normal), in float32 or wider."""
        mixture = linear_rows(self.weights(normal), self.values)
        if self.residual is not None:
            mixture = mixture + self.residual(normal)
        return at_least_float32(mixture)

    def weights(self, normal: torch.Tensor) -> torch.Tensor:
        """Compute the weights w of the prototypes for (..., num_normal): (..., num_prototypes), not negative, sum 1."""
        with torch.autocast(normal.device.type, enabled=False):  # exponentials of differences between large numbers
            beta = self.log_beta.exp()
            # |z_n|^2 is the same for all prototypes: the softmax does not see it.
            similarity = linear_rows(2 * beta * at_least_float32(normal), self.keys, -beta * self.keys.square().sum(-1))
            return similarity.softmax(-1)

    def fit(
        self,
        normal: torch.Tensor,
        abnormal: torch.Tensor,
        num_epochs: int = 16,
        batch_size: int = 2048,
        report: Callable[[float], None] | None = None,
    ) -> None:
        """Fit to the components of normal patches.

        Args:
            normal (torch.Tensor): Shape (K, num_normal).
            abnormal (torch.Tensor): Shape (K, num_abnormal).
            num_epochs (int): Epochs of the network r. Defaults to ``16``: 256 steps for the 32,768 patches that DecAD
                samples of up to five products.
            batch_size (int): Patches in a step. Defaults to ``2048``.
            report (Callable[[float], None] | None): Progress callback, takes the part that is done, in [0, 1]. Defaults
                to ``None``.
        """
        normal, abnormal = normal.detach(), abnormal.detach()
        passes = _KMEANS_ITERATIONS + _OTHER_PASSES
        total = passes + (num_epochs if self.residual is not None else 0)

        def done(count: int) -> None:
            if report is not None:
                report(count / total)

        self._fit_prototypes(normal, abnormal, done)
        done(passes)
        if self.residual is None:
            return
        with torch.no_grad():
            rest = abnormal - in_parts(self, normal)
        num_batches = -(-len(normal) // batch_size)
        optimizer = AdamW(self.residual.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        scheduler = OneCycleLR(optimizer, _LEARNING_RATE, total_steps=num_epochs * num_batches)
        with torch.enable_grad(), torch.autocast(normal.device.type, enabled=False):
            for epoch in range(num_epochs):
                for rows in torch.randperm(len(normal), device=normal.device).chunk(num_batches):
                    optimizer.zero_grad()
                    functional.mse_loss(self.residual(normal[rows]), rest[rows]).backward()
                    optimizer.step()
                    scheduler.step()
                done(passes + epoch + 1)
        optimizer.zero_grad()

    @torch.no_grad()
    def _fit_prototypes(self, normal: torch.Tensor, abnormal: torch.Tensor, done: Callable[[int], None]) -> None:
        total, count = len(self.keys), min(len(self.keys), len(normal))
        if count < total:
            text = "There are %d normal patches to choose prototypes from: %d of %d prototypes are used, and copied."
            logger.warning(text, len(normal), count, total)
        owners, centers = _cluster(normal, count, done)
        # Centers that were drawn twice as a start have no members; other patches take their place.
        empty = torch.bincount(owners, minlength=count) == 0
        centers[empty] = normal[torch.randperm(len(normal), device=normal.device)[: int(empty.sum())]]
        owners = _nearest(normal, centers)
        values, used = _means(abnormal, owners, count)
        centers = centers[used]  # where patches are equal, some centers still have no members
        repeated = torch.arange(total, device=normal.device) % len(centers)
        self.keys.copy_(centers[repeated])
        self.values.copy_(values[repeated].T)
        # The mean over all pairs, without the pairs.
        spread = sum(rows.var(0, correction=0).sum() for rows in (normal, centers))
        distance = (spread + (normal.mean(0) - centers.mean(0)).square().sum()).clamp(min=1e-6)
        self.log_beta.copy_((_SHARPNESS / distance).log())


def _cluster(rows: torch.Tensor, count: int, done: Callable[[int], None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster rows (K, D) as anomalib's KMeans, in bounded memory: the cluster of each (K,) and centers (count, D)."""
    centers = rows[torch.randint(0, len(rows), (count,))].clone()
    owners = rows.new_full((len(rows),), -1, dtype=torch.int64)
    for iteration in range(_KMEANS_ITERATIONS):
        before, owners = owners, _nearest(rows, centers)
        if torch.equal(owners, before):
            return owners, centers
        means, used = _means(rows, owners, count)
        centers[used] = means
        done(iteration + 1)
    return _nearest(rows, centers), centers


def _means(rows: torch.Tensor, owners: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the rows (K, D) of each cluster that has some; say which these are, (count,)."""
    members = torch.bincount(owners, minlength=count)
    used = members > 0
    sums = rows.new_zeros(count, rows.shape[1]).index_add_(0, owners, rows)
    return sums[used] / members[used, None], used


def _nearest(rows: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """Find the nearest center of each row, in bounded memory."""
    return in_parts(lambda part: torch.cdist(part, centers).argmin(1), rows)


class _Network(nn.Module):
    """Three linear layers that start as 0."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.input = nn.Linear(inputs, hidden)
        self.hidden = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.input, self.hidden):
            x = functional.gelu(linear_rows(x, layer.weight, layer.bias))
        return at_least_float32(linear_rows(x, self.output.weight, self.output.bias))
