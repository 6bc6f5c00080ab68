# SPDX-License-Identifier: Apache-2.0
"""The precision that statistics, inverses and perturbations are computed in."""

import torch
from torch.nn import functional

__all__ = ["at_least_float32", "linear_rows"]


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Widen half-precision numbers to float32; leave others as they are.

    Args:
        x (torch.Tensor): Any shape.

    Returns:
        torch.Tensor: Same shape as ``x``, in float32 or wider.
    """
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x


def linear_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply a linear map to all rows at once: exported, its weight keeps its name, by which quantization spares it.

    Args:
        x (torch.Tensor): Shape (..., in_features).
        weight (torch.Tensor): Shape (out_features, in_features).
        bias (torch.Tensor | None): Shape (out_features,).

    Returns:
        torch.Tensor: Shape (..., out_features).
    """
    return functional.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
