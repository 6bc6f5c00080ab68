# SPDX-License-Identifier: Apache-2.0
"""MambaAD's bottleneck: a pyramid's maps joined from the finest to the coarsest."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional
from torchvision.models.resnet import Bottleneck

__all__ = ["HalfFPN"]

_NUM_BLOCKS = 3


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=kernel == 1), nn.BatchNorm2d(outputs)
    )


class HalfFPN(nn.Module):
    """Joins the three maps of a pyramid and halves the result (MambaAD, section 3.1).

    Args:
        channels (Sequence[int]): Channels of the three maps, from the finest; each twice those of the one before, the
            first a multiple of 4.

    Raises:
        ValueError: If they are not.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        if len(channels) != 3 or channels[0] % 4 or list(channels) != [channels[0] * 2**level for level in range(3)]:
            msg = f"MambaAD needs an encoder with three maps that double their channels, got {list(channels)}"
            raise ValueError(msg)
        fine, middle, coarse = channels
        self.fine_down = _convolution(fine, middle, 3, 2)
        self.middle = _convolution(middle, middle, 1, 1)
        self.middle_down = _convolution(middle, coarse, 3, 2)
        self.coarse = _convolution(coarse, coarse, 1, 1)
        self.join = _convolution(coarse, coarse, 1, 1)
        planes = 2 * coarse // Bottleneck.expansion
        down = nn.Sequential(nn.Conv2d(coarse, 2 * coarse, 1, 2, bias=False), nn.BatchNorm2d(2 * coarse))
        self.blocks = nn.Sequential(
            Bottleneck(coarse, planes, 2, down), *(Bottleneck(2 * coarse, planes) for _ in range(_NUM_BLOCKS - 1))
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join three maps, each half as large as the one before, into one of half the size and twice the channels."""
        fine, middle, coarse = maps
        joined = functional.relu(self.middle(middle)) + functional.relu(self.fine_down(fine))
        joined = functional.relu(self.middle_down(joined)) + functional.relu(self.coarse(coarse))
        return self.blocks(functional.relu(self.join(joined)))
