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
    """Compute the orders of MambaAD's hybrid scan.

    Along the curve, along the curve on the transposed map, and both on the map turned by 90 degrees; and each of them
    backwards.

    Args:
        grid (tuple[int, int]): Rows and columns.
        curve (Curve): The curve: ``"hilbert"``, ``"sweep"`` (row by row), ``"scan"`` (row by row, to and fro),
            ``"zigzag"`` (along the diagonals) or ``"zorder"``. On a grid that is no square with a power of two as its
            side, Hilbert and z-order curves are those of the next such square, without what lies outside.
        num_directions (int): 2, 4 or 8.

    Returns:
        torch.Tensor: Positions in their order, integers of shape (num_directions, rows * columns), counted row by row.

    Raises:
        ValueError: If ``curve`` or ``num_directions`` is none of these.

    Reference:
        MambaAD, section 3.3.
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
    rows, columns = positions.shape
    bits = max(rows - 1, columns - 1, 1).bit_length()
    places = [(row, column) for row in range(rows) for column in range(columns)]
    places.sort(key=lambda place: _KEYS[curve](place[0], place[1], bits))
    return np.array([positions[place] for place in places])


def _sweep(row: int, column: int, bits: int) -> tuple[int, ...]:
    del bits
    return row, column


def _scan(row: int, column: int, bits: int) -> tuple[int, ...]:
    del bits
    return row, -column if row % 2 else column


def _zigzag(row: int, column: int, bits: int) -> tuple[int, ...]:
    del bits
    diagonal = row + column
    return diagonal, row if diagonal % 2 else column


def _zorder(row: int, column: int, bits: int) -> tuple[int, ...]:
    return (sum(((row >> bit & 1) << 1 | column >> bit & 1) << 2 * bit for bit in range(bits)),)


def _hilbert(row: int, column: int, bits: int) -> tuple[int, ...]:
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
    return (distance,)


_KEYS: dict[str, Callable[[int, int, int], tuple[int, ...]]] = {
    "hilbert": _hilbert,
    "sweep": _sweep,
    "scan": _scan,
    "zigzag": _zigzag,
    "zorder": _zorder,
}
