# SPDX-License-Identifier: Apache-2.0
"""The training step as a CUDA graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from anomalib_decad.models.decad.loss import DecADLoss
from anomalib_decad.models.decad.torch_model import DecADModel

__all__ = ["GraphedStep"]


class GraphedStep:
    """Replays forward and backward pass of a training step as a CUDA graph.

    A step is thousands of small operations, and an eager one waits for Python to start each of them. The graph is
    recorded for batches of one shape, with the automatic mixed precision that is on at that time. Recording changes
    neither the model nor the random numbers.

    Args:
        model (DecADModel): The model, initialized and on a CUDA device, in training mode.
        loss (DecADLoss): Its loss.
        features (Sequence[torch.Tensor]): Feature maps of a batch, each of shape (B, N, dim).
        grid (tuple[int, int]): Patch rows and columns, N = rows * columns.
    """

    def __init__(
        self, model: DecADModel, loss: DecADLoss, features: Sequence[torch.Tensor], grid: tuple[int, int]
    ) -> None:
        self.grid = grid
        self.shape = features[0].shape
        step = _Step(model, loss, grid)
        device = features[0].device
        buffers = [(buffer, buffer.clone()) for buffer in step.buffers()]
        random_state = torch.cuda.get_rng_state(device)
        dtype = torch.get_autocast_dtype("cuda")
        # The cache of casts belongs to one pass, and a graph is many.
        with torch.autocast("cuda", dtype=dtype, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
            sample = tuple(feature.detach().clone() for feature in features)
            self._step: Any = torch.cuda.make_graphed_callables(step, sample, allow_unused_input=True)
        self.names = step.names
        for buffer, before in buffers:
            buffer.copy_(before)
        torch.cuda.set_rng_state(random_state, device)

    def fits(self, features: Sequence[torch.Tensor], grid: tuple[int, int]) -> bool:
        """Whether a batch has the shape that was recorded."""
        return grid == self.grid and features[0].shape == self.shape

    def __call__(self, features: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute the loss of a batch, and its terms, as :class:`DecADLoss` does. Only the loss has a gradient."""
        return dict(zip(self.names, self._step(*features), strict=True))


class _Step(nn.Module):
    """From feature maps to the values of a loss."""

    def __init__(self, model: DecADModel, loss: DecADLoss, grid: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.grid = grid
        self.names: tuple[str, ...] = ()

    def forward(self, *features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        terms = self.loss(self.model.training_output(features, self.grid))
        self.names = tuple(terms)
        return tuple(value if name == "loss" else value.detach() for name, value in terms.items())
