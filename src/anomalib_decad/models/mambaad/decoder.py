# SPDX-License-Identifier: Apache-2.0
"""MambaAD's decoder: locality-enhanced state spaces with hybrid scanning."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from timm.layers import DropPath, trunc_normal_
from torch import nn
from torch.nn import functional

from anomalib_decad.models.mambaad.selective_scan import selective_scan
from anomalib_decad.ranges import check_range

__all__ = ["HybridStateSpace", "LocalityEnhancedStateSpace", "MambaDecoder", "scan_orders"]

_NUM_STATES = 16
_EXPANSION = 2

_MIN_DELTA, _MAX_DELTA = 0.001, 0.1  # range of the step sizes that the scan starts with
_KERNELS = (5, 7)  # of the convolutions beside the state spaces
_DROP_PATH = 0.2  # share of residual branches dropped in training in the first block; none are in the last


@cache  # a decoder has many blocks of a few sizes
def scan_orders(grid: tuple[int, int], num_directions: int) -> torch.Tensor:
    """Compute the orders of MambaAD's hybrid scan along the Hilbert curve (section 3.3).

    Along the curve, along the curve on the transposed map, and both on the map turned by 90 degrees; and each of them
    backwards. The curve is that of the next square whose side is a power of two, without what lies outside of the grid.

    Args:
        grid (tuple[int, int]): Rows and columns.
        num_directions (int): 2, 4 or 8, else a ValueError.

    Returns:
        torch.Tensor: Positions in their order, integers of shape (num_directions, rows * columns), counted row by row.
    """
    check_range(num_directions in {2, 4, 8}, "num_directions", "2, 4 or 8", num_directions)
    positions = np.arange(grid[0] * grid[1]).reshape(grid)
    turned = np.rot90(positions)
    views = (positions, positions.T, turned, turned.T)
    forwards = torch.from_numpy(np.stack([_along_curve(view) for view in views[: num_directions // 2]]))
    return torch.cat([forwards, forwards.flip(-1)])


def _along_curve(positions: np.ndarray) -> np.ndarray:
    """Put a grid's positions in the order of the curve."""
    bits = max(*(side - 1 for side in positions.shape), 1).bit_length()
    places = sorted(np.ndindex(*positions.shape), key=lambda place: _hilbert(place[0], place[1], bits))
    return np.array([positions[place] for place in places])


def _hilbert(row: int, column: int, bits: int) -> int:
    """Compute the distance along the Hilbert curve, quadrant by quadrant from the largest."""
    distance = 0
    for bit in reversed(range(bits)):
        side = 1 << bit
        below, right = int(bool(row & side)), int(bool(column & side))
        distance += side * side * (3 * right ^ below)
        row, column = row & side - 1, column & side - 1
        if not below:
            if right:
                row, column = side - 1 - row, side - 1 - column
            row, column = column, row
    return distance


class HybridStateSpace(nn.Module):
    """Selective state space that scans a feature map in several directions and sums (MambaAD, section 3.3).

    Args:
        dim (int): Number of channels.
        grid (tuple[int, int]): Rows and columns of the feature map.
        num_directions (int): 2, 4 or 8.

    Raises:
        ValueError: If ``num_directions`` is none of these.
    """

    order: torch.Tensor
    inverse: torch.Tensor

    def __init__(self, dim: int, grid: tuple[int, int], num_directions: int) -> None:
        super().__init__()
        inner = _EXPANSION * dim
        self.rank = math.ceil(dim / 16)
        self.input_projection = nn.Linear(dim, 2 * inner, bias=False)
        self.convolution = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        bound = inner**-0.5
        self.parameter_projection = nn.Parameter(
            torch.empty(num_directions, self.rank + 2 * _NUM_STATES, inner).uniform_(-bound, bound)
        )
        bound = self.rank**-0.5
        self.delta_projection = nn.Parameter(torch.empty(num_directions, inner, self.rank).uniform_(-bound, bound))
        delta = torch.empty(num_directions, inner).uniform_(math.log(_MIN_DELTA), math.log(_MAX_DELTA)).exp()
        self.delta_bias = nn.Parameter(delta + torch.log(-torch.expm1(-delta)))  # softplus gives delta again
        states = torch.arange(1, _NUM_STATES + 1, dtype=torch.float32)
        self.log_a = nn.Parameter(states.log().repeat(num_directions, inner, 1))
        self.skip = nn.Parameter(torch.ones(num_directions, inner))
        self.norm = nn.LayerNorm(inner)
        self.output_projection = nn.Linear(inner, dim, bias=False)
        order = scan_orders(grid, num_directions)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse", order.argsort(dim=1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scan a feature map of shape (B, rows, columns, dim); the result has the same shape."""
        features, gate = self.input_projection(x).chunk(2, dim=-1)
        features = functional.silu(self.convolution(features.permute(0, 3, 1, 2)))
        y = self._scan(features.flatten(2)).mT.unflatten(1, x.shape[1:3])
        return self.output_projection(self.norm(y.to(x.dtype)) * functional.silu(gate))

    def _scan(self, features: torch.Tensor) -> torch.Tensor:
        """Scan features of shape (B, inner, L) in all directions and sum, same shape."""
        directions = torch.stack([features[..., order] for order in self.order], dim=1)
        parameters = self.parameter_projection @ directions
        rank, b, c = parameters.split([self.rank, _NUM_STATES, _NUM_STATES], dim=2)
        delta = functional.softplus((self.delta_projection @ rank).float() + self.delta_bias[..., None])
        y = selective_scan(directions, delta, -self.log_a.float().exp(), b, c, self.skip)
        return torch.stack([y[:, index][..., order] for index, order in enumerate(self.inverse)]).sum(0)


class _StateSpaceBlock(nn.Module):
    def __init__(self, dim: int, grid: tuple[int, int], num_directions: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.state_space = HybridStateSpace(dim, grid, num_directions)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(self.state_space(self.norm(x)))


def _convolution(dim: int, kernel: int) -> nn.Sequential:
    """Depthwise convolution between two of size 1, each with an instance norm and SiLU."""
    convolutions = (
        nn.Conv2d(dim, dim, 1),
        nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False),
        nn.Conv2d(dim, dim, 1),
    )
    return nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.InstanceNorm2d(dim), nn.SiLU())))


class LocalityEnhancedStateSpace(nn.Module):
    """State space blocks, which see the whole map, beside convolutions, which see the neighborhood (section 3.2).

    The arguments are those of :class:`HybridStateSpace`, and for each block the share that is dropped in training.
    """

    def __init__(self, dim: int, grid: tuple[int, int], num_directions: int, drop_paths: Sequence[float]) -> None:
        super().__init__()
        blocks = [_StateSpaceBlock(dim, grid, num_directions, drop_path) for drop_path in drop_paths]
        self.blocks = nn.Sequential(*blocks)
        self.convolutions = nn.ModuleList(_convolution(dim, kernel) for kernel in _KERNELS)
        self.join = nn.Conv2d((1 + len(_KERNELS)) * dim, dim, 1)
        for module in (*self.convolutions.modules(), self.join):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform a feature map of shape (B, rows, columns, dim); the result has the same shape."""
        channels_first = x.permute(0, 3, 1, 2)
        parts = [self.blocks(x).permute(0, 3, 1, 2), *(branch(channels_first) for branch in self.convolutions)]
        return x + self.join(torch.cat(parts, dim=1)).permute(0, 2, 3, 1)


class _PatchExpand(nn.Module):
    """Twice the rows and columns, half the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(dim // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.expand(x).unflatten(-1, (2, 2, -1))  # (B, rows, columns, 2, 2, dim / 2)
        return self.norm(x.transpose(2, 3).flatten(3, 4).flatten(1, 2))


class MambaDecoder(nn.Module):
    """Decodes an embedding to feature maps of twice its size and half its channels, and again (MambaAD, section 3.1).

    Args:
        dim (int): Channels of the embedding.
        grid (tuple[int, int]): Its rows and columns.
        depths (Sequence[int]): State space blocks of each stage, from the coarsest; multiples of 2 or 3.
        num_directions (int): See :class:`HybridStateSpace`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, dim: int, grid: tuple[int, int], depths: Sequence[int], num_directions: int) -> None:
        super().__init__()
        if len(depths) < 2 or any(depth < 1 or (depth % 2 and depth % 3) for depth in depths):
            msg = f"depths must be multiples of 2 or 3, at least two of them, got {list(depths)}"
            raise ValueError(msg)
        rates = iter(torch.linspace(_DROP_PATH, 0, sum(depths)).tolist())
        stages = []
        for level, depth in enumerate(depths):
            width = dim // 2**level
            size = (grid[0] * 2**level, grid[1] * 2**level)
            length = 3 if depth % 3 == 0 else 2
            modules: list[nn.Module] = [_PatchExpand(2 * width)] if level else []
            modules += [
                LocalityEnhancedStateSpace(width, size, num_directions, [next(rates) for _ in range(length)])
                for _ in range(depth // length)
            ]
            stages.append(nn.Sequential(*modules))
        self.stages = nn.ModuleList(stages)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)

    def forward(self, embeddings: torch.Tensor) -> list[torch.Tensor]:
        """Decode (B, dim, rows, columns) to the maps of all stages but the first, from the finest, channels first."""
        x = embeddings.permute(0, 2, 3, 1)
        maps: list[torch.Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.insert(0, x.permute(0, 3, 1, 2).float())
        return maps[:-1]
