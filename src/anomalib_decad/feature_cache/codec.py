# SPDX-License-Identifier: Apache-2.0
"""How features become half-precision numbers and back."""

from dataclasses import dataclass

import torch

__all__ = ["FeatureCode"]


@dataclass
class FeatureCode:
    """How features become float16 and back: ``(features - offset) / scale``.

    A few channels of a vision transformer are large and nearly constant. Without the code float16 would round away
    what varies in them.

    Args:
        offset (torch.Tensor): Shape (layers, 1, dim).
        scale (torch.Tensor): Shape (layers, 1, dim), positive.
    """

    offset: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def from_features(cls, features: torch.Tensor) -> "FeatureCode":
        """Choose a code by features of shape (B, layers, N, dim)."""
        std, mean = torch.std_mean(features.float(), dim=(0, 2))
        return cls(mean.unsqueeze(1), std.clamp(min=1e-6).unsqueeze(1))

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Make float16 of features of shape (..., layers, N, dim)."""
        return ((features.float() - self.offset) / self.scale).clamp(-65504, 65504).half()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Make float32 features of what :meth:`encode` gave, on its device."""
        return torch.addcmul(self.offset.to(codes.device), codes.float(), self.scale.to(codes.device))
