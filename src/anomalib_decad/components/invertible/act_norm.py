# SPDX-License-Identifier: Apache-2.0
"""FrEIA's ActNorm, made safe for evaluation before training and for data-parallel training."""

from collections.abc import Iterable, Sequence

import torch
from FrEIA import modules

__all__ = ["ActNorm"]

# Deviation of a channel, relative to the largest, below which it is not scaled to 1.
_SMALLEST = 1e-2


class ActNorm(modules.ActNorm):
    """Channel-wise scale and bias that start from the statistics of the first training batch.

    Unlike its base class, it

    - stays the identity in eval mode until it was initialised, so that a validation pass before training (Lightning's
      sanity check) does not initialise it;
    - initialises from the batches of all processes together, so that data-parallel replicas stay equal;
    - keeps channels that do not vary finite;
    - stores in its state whether it was initialised.

    Args:
        dims_in (Iterable[tuple[int, ...]]): ``[(dim,)]``, as FrEIA passes it.
        dims_c (Iterable[tuple[int]] | None): Unused; part of FrEIA's module contract.
    """

    initialised: torch.Tensor
    init_on_next_batch: bool

    def __init__(self, dims_in: Iterable[tuple[int, ...]], dims_c: Iterable[tuple[int]] | None = None) -> None:
        super().__init__(dims_in, dims_c)
        self.register_buffer("initialised", torch.tensor(False))
        # The base class takes any loaded state for initialised, by a hook that is bound to this very instance and
        # cannot be pickled.
        self._load_state_dict_pre_hooks.clear()
        self.register_load_state_dict_post_hook(self._restore_flag)

    @staticmethod
    def _restore_flag(module: "ActNorm", incompatible_keys: object) -> None:
        del incompatible_keys
        module.init_on_next_batch = not bool(module.initialised)

    def forward(
        self, x: Sequence[torch.Tensor], rev: bool = False, jac: bool = True
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Scale and shift, or undo it.

        Args:
            x (Sequence[torch.Tensor]): One tensor of shape (N, dim).
            rev (bool): Apply the inverse.
            jac (bool): Unused: the log-determinant is always computed.

        Returns:
            tuple[list[torch.Tensor], torch.Tensor]: Output of shape (N, dim), and the log-determinant of shape (N,).
        """
        pending = self.init_on_next_batch
        if pending and self.training and not rev:
            self._initialize_with_data(x[0])
        elif pending:
            self.init_on_next_batch = False  # the base class would initialise on any call
        output = super().forward(x, rev=rev, jac=jac)
        self.init_on_next_batch = pending and not bool(self.initialised)
        return output

    @torch.no_grad()
    def _initialize_with_data(self, data: torch.Tensor) -> None:
        moments = torch.stack([torch.ones_like(data[0]), data.mean(0), data.square().mean(0)]) * len(data)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(moments)
        count, total, total_square = moments
        mean = total / count
        std = (total_square / count - mean.square()).clamp(min=0).sqrt()
        # What varies less is rounding error, which must not be blown up: in bfloat16 it would be all there is.
        std = std.clamp(min=_SMALLEST * std.max().item())
        std = torch.where(std > 1e-6, std, torch.ones_like(std))
        self.scale.copy_(-std.log().view_as(self.scale))
        self.bias.copy_((-mean / std).view_as(self.bias))
        self.initialised.fill_(True)
        self.init_on_next_batch = False
