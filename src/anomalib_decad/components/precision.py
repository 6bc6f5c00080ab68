# SPDX-License-Identifier: Apache-2.0
"""Helpers for tensors whose rows are patches: their precision, linear maps of them, many in bounded memory."""

from collections.abc import Callable

import torch
from torch.nn import functional

__all__ = ["at_least_float32", "in_parts", "linear_rows"]

# Rows in a part: with 5,120 prototypes, its distances to all of them take a third of a gigabyte.
_ROWS = 16_384


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Widen half-precision numbers to float32; leave others as they are."""
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x


def linear_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply a linear map to (..., inputs) as one matrix product: exported, its weight keeps its name."""
    return functional.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def in_parts(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Apply a function that acts on each row of (K, ...) alone to some rows at a time."""
    return torch.cat([function(part) for part in rows.split(_ROWS)])
