# SPDX-License-Identifier: Apache-2.0
"""What the abnormal component of a normal patch is, given its normal component."""

import torch
from torch import nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from anomalib_decad.components.precision import at_least_float32, linear_rows

__all__ = ["ConditionalPrior"]

_LEARNING_RATE, _WEIGHT_DECAY = 2e-3, 1e-2


class ConditionalPrior(nn.Module):
    r"""Predicts the abnormal component of a normal patch from its normal component, :math:`z_a \approx p(z_n)`.

    A network of three linear layers. It starts as p = 0, the prior of independent components, and is learned: by
    :meth:`fit` before the training, and by the training's losses.

    A prior of 0 asks for the same abnormal component of all normal patches, whatever they show: one product or another,
    a part of it or the background. Where it depends on that, and the normal component tells it, this prior is sharper.

    Measured (``benchmarks/NOTES.md``, "Prior"): without any training the energy has a mean of the seven metrics of 79.7
    with a prior of 0, of 80.8 with one for each category, if that were known, and of 81.8 with this one.

    Args:
        num_normal (int): Channels of the normal component; at least 1.
        num_abnormal (int): Channels of the abnormal component; at least 1.
        hidden_dim (int): Channels inside; at least 1.
            Defaults to ``512``.

    Raises:
        ValueError: If a number of channels is below 1.

    Example:
        >>> prior = ConditionalPrior(num_normal=24, num_abnormal=8)
        >>> prior(torch.randn(2, 100, 24)).shape
        torch.Size([2, 100, 8])
    """

    def __init__(self, num_normal: int, num_abnormal: int, hidden_dim: int = 512) -> None:
        super().__init__()
        for name, value in (("num_normal", num_normal), ("num_abnormal", num_abnormal), ("hidden_dim", hidden_dim)):
            if value < 1:
                msg = f"{name} must be at least 1, got {value}"
                raise ValueError(msg)
        self.input = nn.Linear(num_normal, hidden_dim)
        self.hidden = nn.Linear(hidden_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, num_abnormal)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, normal: torch.Tensor) -> torch.Tensor:
        """Predict abnormal components.

        Args:
            normal (torch.Tensor): Normal components of shape (..., num_normal).

        Returns:
            torch.Tensor: Abnormal components of shape (..., num_abnormal), in float32 or wider.
        """
        x = functional.gelu(linear_rows(normal, self.input.weight, self.input.bias))
        x = functional.gelu(linear_rows(x, self.hidden.weight, self.hidden.bias))
        return at_least_float32(linear_rows(x, self.output.weight, self.output.bias))

    def fit(self, normal: torch.Tensor, abnormal: torch.Tensor, num_epochs: int = 64, batch_size: int = 2048) -> None:
        """Regress abnormal on normal components of normal patches.

        Args:
            normal (torch.Tensor): Shape (K, num_normal).
            abnormal (torch.Tensor): Shape (K, num_abnormal).
            num_epochs (int): How often each patch is used.
                Defaults to ``64``: 1,024 steps for the 32,768 patches that DecAD samples.
            batch_size (int): Patches in a step.
                Defaults to ``2048``.
        """
        normal, abnormal = normal.detach(), abnormal.detach()
        num_batches = -(-len(normal) // batch_size)
        optimizer = AdamW(self.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        scheduler = OneCycleLR(optimizer, _LEARNING_RATE, total_steps=num_epochs * num_batches)
        with torch.enable_grad(), torch.autocast(normal.device.type, enabled=False):
            for _ in range(num_epochs):
                for rows in torch.randperm(len(normal), device=normal.device).chunk(num_batches):
                    optimizer.zero_grad()
                    functional.mse_loss(self(normal[rows]), abnormal[rows]).backward()
                    optimizer.step()
                    scheduler.step()
        optimizer.zero_grad()
