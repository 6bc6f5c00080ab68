# SPDX-License-Identifier: Apache-2.0
"""Fusion of the tapped feature maps into one embedding for each patch."""

from collections.abc import Sequence

import torch
from torch.nn import functional

__all__ = ["fuse"]


def fuse(taps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Average layer-normalised feature maps.

    Args:
        taps (Sequence[torch.Tensor]): Feature maps of shape (B, N, dim).

    Returns:
        torch.Tensor: Embeddings of shape (B, N, dim).
    """
    normalised = [functional.layer_norm(tap, tap.shape[-1:]) for tap in taps]
    return torch.stack(normalised).mean(0)
