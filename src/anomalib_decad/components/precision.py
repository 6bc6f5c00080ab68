# SPDX-License-Identifier: Apache-2.0
"""The precision that statistics, inverses and perturbations are computed in."""

import torch

__all__ = ["at_least_float32"]


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Widen half-precision numbers to float32; leave others as they are.

    Args:
        x (torch.Tensor): Any shape.

    Returns:
        torch.Tensor: Same shape as ``x``, in float32 or wider.
    """
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x
