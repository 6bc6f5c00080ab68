# SPDX-License-Identifier: Apache-2.0
"""Orders in which a feature map is scanned: curves and directions."""

from collections.abc import Callable
from functools import cache
from typing import Literal

import numpy as np
import torch

from anomalib_decad.ranges import check_range

__all__ = ["Curve", "scan_orders"]

Curve = Literal["hilbert", "sweep", "scan", "zigzag", "zorder"]


@cache  # a decoder has many blocks of a few sizes
def scan_orders(grid: tuple[int, int], curve: Curve, num_directions: int) -> torch.Tensor:
    """Compute the orders of MambaAD's hybrid scan (section 3.3).

    Along the curve, along the curve on the transposed map, and both on the map turned by 90 degrees; and each of them
    backwards.

    Args:
        grid (tuple[int, int]): Rows and columns.
        curve (Curve): ``"hilbert"``, ``"sweep"`` (row by row), ``"scan"`` (row by row, to and fro), ``"zigzag"`` (along
            the diagonals) or ``"zorder"``. Hilbert and z-order curves are those of the next square whose side is a
            power of two, without what lies outside of the grid.
        num_directions (int): 2, 4 or 8.

    Returns:
        torch.Tensor: Positions in their order, integers of shape (num_directions, rows * columns), counted row by row.

    Raises:
        ValueError: If ``curve`` or ``num_directions`` is none of these.
    """
    check_range(curve in _KEYS, "scan", f"one of {', '.join(_KEYS)}", repr(curve))
    check_range(num_directions in {2, 4, 8}, "num_directions", "2, 4 or 8", num_directions)
    positions = np.arange(grid[0] * grid[1]).reshape(grid)
    turned = np.rot90(positions)
    views = (positions, positions.T, turned, turned.T)
    forwards = torch.from_numpy(np.stack([_along(curve, view) for view in views[: num_directions // 2]]))
    return torch.cat([forwards, forwards.flip(-1)])


def _along(curve: Curve, positions: np.ndarray) -> np.ndarray:
    """Put a grid's positions in the order of a curve."""
    bits = max(*(side - 1 for side in positions.shape), 1).bit_length()
    places = sorted(np.ndindex(*positions.shape), key=lambda place: _KEYS[curve](place[0], place[1], bits))
    return np.array([positions[place] for place in places])


def _zorder(row: int, column: int, bits: int) -> int:
    return sum(((row >> bit & 1) << 1 | column >> bit & 1) << 2 * bit for bit in range(bits))


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


#: By what the positions are sorted: of row, column and bits of a coordinate.
_KEYS: dict[str, Callable[[int, int, int], int | tuple[int, int]]] = {
    "hilbert": _hilbert,
    "sweep": lambda row, column, _: (row, column),
    "scan": lambda row, column, _: (row, -column if row % 2 else column),
    "zigzag": lambda row, column, _: (row + column, row if (row + column) % 2 else column),
    "zorder": _zorder,
}
