# SPDX-License-Identifier: Apache-2.0
"""ActNorm as FrEIA's module contract has it, safe for evaluation before training and for data-parallel training."""

from collections.abc import Iterable, Sequence

import torch
from FrEIA.modules import InvertibleModule
from torch import nn

__all__ = ["ActNorm"]

# Deviations of a channel, relative to the median channel's and to the largest, below which it is not scaled to 1.
_OF_MEDIAN, _OF_LARGEST = 0.5, 0.01


class ActNorm(InvertibleModule):
    r"""Channel-wise scale and bias, :math:`y = e^s x + b`, that start from the statistics of the first training batch.

    Unlike FrEIA's own ActNorm, it

    - stays the identity in eval mode until it was initialized, so that a validation pass before training (Lightning's
      sanity check) does not initialize it;
    - initializes from the batches of all processes together, so that data-parallel replicas stay equal;
    - stretches no channel by more than twice what the median channel is stretched by. A channel that hardly varies
      holds rounding error, and what units learn to put into it would be stretched with it, without an end: the layer
      norms of an encoder leave such a channel (``benchmarks/NOTES.md``, "Energy");
    - stores in its state whether it was initialized.

    Args:
        dims_in (Iterable[tuple[int, ...]]): ``[(dim,)]``, as FrEIA passes it.
        dims_c (Iterable[tuple[int, ...]] | None): Must be empty: the layer takes no condition.
        is_learned (bool): Whether scale and bias are learned after that; without, they stay as they started.
            Defaults to ``True``.

    Reference:
        D. P. Kingma and P. Dhariwal, Glow, NeurIPS 2018, section 3.1.
    """

    initialized: torch.Tensor

    def __init__(
        self,
        dims_in: Iterable[tuple[int, ...]],
        dims_c: Iterable[tuple[int, ...]] | None = None,
        is_learned: bool = True,
    ) -> None:
        super().__init__(dims_in, dims_c)
        ((dim,),) = self.dims_in
        self.scale = nn.Parameter(torch.zeros(dim), requires_grad=is_learned)
        self.bias = nn.Parameter(torch.zeros(dim), requires_grad=is_learned)
        self.register_buffer("initialized", torch.tensor(False))
        # The same as a Python value: reading the buffer would make a device wait in each pass.
        self.is_initialized = False
        self.register_load_state_dict_post_hook(self._on_state_dict)

    @staticmethod
    def _on_state_dict(module: "ActNorm", incompatible_keys: object) -> None:
        del incompatible_keys
        module.is_initialized = bool(module.initialized)

    def forward(
        self,
        x_or_z: Sequence[torch.Tensor],
        c: Iterable[torch.Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[torch.Tensor], torch.Tensor]:
        """Scale and shift, or undo it.

        Args:
            x_or_z (Sequence[torch.Tensor]): One tensor of shape (N, dim).
            c (Iterable[torch.Tensor] | None): Unused.
            rev (bool): Apply the inverse.
            jac (bool): Unused: the log-determinant costs nothing.

        Returns:
            tuple[tuple[torch.Tensor], torch.Tensor]: Output of shape (N, dim), and the log-determinant of shape (N,).
        """
        del c, jac
        (x,) = x_or_z
        if self.training and not rev and not self.is_initialized:
            self._initialize(x)
        log_det = self.scale.sum().expand(len(x))
        if rev:
            return ((x - self.bias) * (-self.scale).exp(),), -log_det
        return (x * self.scale.exp() + self.bias,), log_det

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the input dimensions: the layer keeps them."""
        return input_dims

    @torch.no_grad()
    def _initialize(self, data: torch.Tensor) -> None:
        moments = torch.stack([torch.ones_like(data[0]), data.mean(0), data.square().mean(0)]) * len(data)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(moments)
        count, total, total_square = moments
        mean = total / count
        std = (total_square / count - mean.square()).clamp(min=0).sqrt()
        std = std.clamp(min=max(_OF_MEDIAN * std.median().item(), _OF_LARGEST * std.max().item()))
        std = torch.where(std > 1e-6, std, torch.ones_like(std))
        self.scale.copy_(-std.log())
        self.bias.copy_(-mean / std)
        self.initialized.fill_(True)
        self.is_initialized = True
