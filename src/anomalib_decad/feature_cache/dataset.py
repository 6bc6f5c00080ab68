# SPDX-License-Identifier: Apache-2.0
"""Indices in place of images, and batches of the half-precision features that they stand for."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

__all__ = ["CachedFeatures", "FeatureBatch", "FeatureCode", "IndexBatch"]


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

    def to(self, device: torch.device) -> "FeatureCode":
        """Copy the code to a device."""
        return FeatureCode(self.offset.to(device), self.scale.to(device))

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Make float16 of features of shape (..., layers, N, dim)."""
        return ((features.float() - self.offset) / self.scale).clamp(-65504, 65504).half()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Make float32 features of what :meth:`encode` gave, on its device."""
        return torch.addcmul(self.offset.to(codes.device), codes.float(), self.scale.to(codes.device))


@dataclass
class FeatureBatch:
    """Features in place of images. What anomalib's pre-processor would transform is ``None``.

    Args:
        codes (torch.Tensor): Encoded features, float16 of shape (B, layers, N, dim).
        code (FeatureCode): Their code.
        grid (tuple[int, int]): Patch rows and columns, N = rows * columns.
    """

    codes: torch.Tensor
    code: FeatureCode
    grid: tuple[int, int]
    image: None = None
    gt_mask: None = None

    def features(self) -> list[torch.Tensor]:
        """Decode to float32 feature maps of shape (B, N, dim), one for each layer."""
        return list(self.code.decode(self.codes).unbind(1))


@dataclass
class IndexBatch:
    """Indices of the images of a batch; ``FeatureCaching.look_up`` gives their features."""

    indices: list[int]  # no tensor: reading one back from a GPU waits for the GPU
    image: None = None
    gt_mask: None = None


class CachedFeatures(Dataset):
    """Gives indices in the place of one of anomalib's datasets, ``images``."""

    collate_fn = IndexBatch

    def __init__(self, images: Any) -> None:
        self.images, self.samples = images, images.samples

    def __len__(self) -> int:
        """Count the images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> int:
        """Give the index itself."""
        return index
