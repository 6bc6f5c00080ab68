# SPDX-License-Identifier: Apache-2.0
"""Adversarial synthesis of anomalies in feature space."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from anomalib_decad.components.options import SynthesisOptions
from anomalib_decad.components.whitening import at_least_float32
from anomalib_decad.ranges import check_range

__all__ = ["AdversarialSynthesis"]

Energy = Callable[[torch.Tensor], torch.Tensor]

# Regions cover shares of an image's patches that are to each other as numbers between these, and their mean on average.
_SMALLEST_REGION, _LARGEST_REGION = 0.02, 0.3

_STEP_LENGTHS = (1.0, 0.5, 0.25)  # of a gradient step, relative to delta
_METRIC_SAMPLES = 512  # differences of patches that the metric is taken from
_SMALLEST_DIFFERENCE = 1e-5  # relative to the norm of the patches, or to delta


class AdversarialSynthesis(nn.Module):
    r"""Perturbs patch embeddings into the anomalies that the model misses most.

    :math:`\tilde{x} = x + \varepsilon` with :math:`\|\varepsilon\|_2 = \delta` on the chosen patches and 0 elsewhere.
    :math:`\varepsilon` starts at a random point of the sphere of radius delta and follows the normalized gradient
    that lowers the energy H of the decoupler, back onto the sphere after each step. Only the gradient of H is needed:
    the encoder is never called, no image is edited.

    Both the start and the steps keep to directions in which features vary: the start is the difference d of two patches
    of the batch, and the gradient is taken in the metric of such differences, :math:`\mathrm{E}[dd^T]\,\nabla H`. Of
    several lengths, a step takes the one with the lowest energy that is not below that of the unperturbed patch, or
    none: a full step could end more normal than normal patches (``benchmarks/synthesis.py``).

    The chosen patches are random blobs (smooth noise above a quantile), on some of the images of a batch. The radius
    and the normalized gradient of the energy are those of DecAD's supplement.

    Args:
        delta (float): Radius of the perturbation, in units of the embeddings; positive. Defaults to ``2.5``, the best
            value of DecAD's ablation.
        options (SynthesisOptions): Further options.

    Raises:
        ValueError: If ``delta`` is not positive.
    """

    def __init__(self, delta: float = 2.5, options: SynthesisOptions = SynthesisOptions(fraction=0.5)) -> None:
        super().__init__()
        check_range(delta > 0, "delta", "positive", delta)
        self.delta = delta
        self.options = options

    def forward(
        self, x: torch.Tensor, energy: Energy, grid: tuple[int, int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Perturb embeddings.

        Args:
            x (torch.Tensor): Embeddings of shape (B, N, dim); no gradient goes into them.
            energy (Callable): Maps embeddings of shape (K, dim) to abnormal energies of shape (K,).
            grid (tuple[int, int] | None): Patch rows and columns, N = rows * columns. Defaults to ``None``: a square
                grid if N is a square, else one row.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Perturbed embeddings of shape (B, N, dim), and which patches were
                perturbed, booleans of shape (B, N).
        """
        x = x.detach()
        rows = x.flatten(0, 1)
        mask, perturbed = torch.zeros(len(rows), dtype=torch.bool, device=x.device), rows.clone()
        indices = self._choose_patches(x, grid or _square_grid(x.shape[1]))
        if len(indices):
            chosen = rows[indices]
            perturbed[indices] = chosen + self._perturbation(x, chosen, energy).to(x.dtype)
            mask.index_fill_(0, indices, True)
        return perturbed.view_as(x), mask.view(x.shape[:2])

    def _start(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Draw perturbations of embeddings, of shape (K, dim) as ``chosen``, from a batch of shape (B, N, dim)."""
        gaussian = self._to_sphere(at_least_float32(torch.randn_like(chosen)))
        if self.options.noise == "gaussian":
            return gaussian
        differences = _differences(x, len(chosen))
        # Not where both are the same patch, or equal.
        different = differences.norm(dim=-1, keepdim=True) > _SMALLEST_DIFFERENCE * x.norm(dim=-1).mean()
        return torch.where(different, self._to_sphere(differences), gaussian)

    def _perturbation(self, x: torch.Tensor, chosen: torch.Tensor, energy: Energy) -> torch.Tensor:
        """Perturb the embeddings ``chosen``, of shape (K, dim), of a batch of shape (B, N, dim)."""
        eps = self._start(x, chosen)
        chosen = at_least_float32(chosen)
        differences = _differences(x, _METRIC_SAMPLES)
        for _ in range(self.options.num_steps):
            point = (chosen + eps).requires_grad_()
            with torch.enable_grad():
                level = energy(point)
                (gradient,) = torch.autograd.grad(level.sum(), point)
            with torch.autocast(x.device.type, enabled=False):  # float16 could overflow
                direction = functional.normalize(gradient @ differences.T @ differences, dim=-1)
            eps = self._step(chosen, eps, level.detach(), direction, energy)
        return eps

    @torch.no_grad()
    def _step(
        self, chosen: torch.Tensor, eps: torch.Tensor, level: torch.Tensor, direction: torch.Tensor, energy: Energy
    ) -> torch.Tensor:
        """Choose the length of a step against a direction, each tensor of shape (K, dim) but the energies ``level``."""
        moved = torch.stack([eps - length * self.delta * direction for length in _STEP_LENGTHS])  # (lengths, K, dim)
        # Where a step ends in the middle of the sphere, no direction is left.
        is_off_center = moved.norm(dim=-1, keepdim=True) > _SMALLEST_DIFFERENCE * self.delta
        candidates = torch.where(is_off_center, self._to_sphere(moved), eps)
        points = torch.cat([chosen[None], chosen + candidates])
        levels = energy(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        normal, levels = levels[0], levels[1:]
        levels = torch.cat([levels.masked_fill(levels < normal, torch.inf), level[None]])  # the last one is no step
        best = levels.argmin(0)
        return torch.cat([candidates, eps[None]])[best, torch.arange(len(eps), device=eps.device)]

    def _to_sphere(self, eps: torch.Tensor) -> torch.Tensor:
        return self.delta * functional.normalize(eps, dim=-1)

    def _choose_patches(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Draw the patches to perturb, as indices of shape (K,) into all patches of the batch.

        K follows from the shape of the batch alone: a device never waits for it, and can replay a step as a graph.
        """
        batch, num_patches = x.shape[:2]
        if not self.options.fraction:
            return torch.empty(0, dtype=torch.long, device=x.device)
        images = max(round(self.options.fraction * batch), 1)
        noise = torch.rand(batch, 1, *(max(side // self.options.blob_size, 2) for side in grid), device=x.device)
        noise = functional.interpolate(noise, size=grid, mode="bicubic", align_corners=True).reshape(batch, num_patches)
        rank = noise.argsort(dim=1, descending=True).argsort(dim=1)
        share = torch.empty(batch, 1, device=x.device).uniform_(_SMALLEST_REGION, _LARGEST_REGION)
        is_chosen = torch.rand(batch, 1, device=x.device).argsort(0).argsort(0) < images
        # The first ones of all regions, which grow at the speed of their shares.
        order = ((rank + 0.5) / share).masked_fill(~is_chosen, torch.inf).flatten()
        count = max(round((_SMALLEST_REGION + _LARGEST_REGION) / 2 * images * num_patches), 1)
        return order.argsort()[:count]


def _differences(x: torch.Tensor, count: int) -> torch.Tensor:
    """Draw differences of two patches, of shape (count, dim), from a batch of shape (B, N, dim)."""
    pool = at_least_float32(x.flatten(0, 1))
    first, second = torch.randint(len(pool), (2, count), device=x.device)
    return pool[first] - pool[second]


def _square_grid(num_patches: int) -> tuple[int, int]:
    """Guess the grid of a number of patches: a square if it is one, else one row."""
    side = round(num_patches**0.5)
    return (side, side) if side * side == num_patches else (1, num_patches)
