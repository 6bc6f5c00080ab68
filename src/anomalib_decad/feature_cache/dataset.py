# SPDX-License-Identifier: Apache-2.0
"""Cached features in the place of a dataset of images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from anomalib_decad.feature_cache.codec import FeatureCode

__all__ = ["CachedFeatures", "FeatureBatch"]


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
        """Decode to a list of float32 feature maps of shape (B, N, dim), one for each layer."""
        return list(self.code.decode(self.codes).unbind(1))


class CachedFeatures(Dataset):
    """Dataset of features, in the place of a dataset of images; :meth:`fill` gives it the features.

    Args:
        images (Any): The anomalib dataset of images.
    """

    def __init__(self, images: Any) -> None:
        self.images = images
        self.samples = images.samples
        self.is_filled = False

    def fill(self, features: np.ndarray | Path, code: FeatureCode, grid: tuple[int, int]) -> None:
        """Set the features.

        Args:
            features (np.ndarray | Path): float16 of shape (images, layers, N, dim), or a file of them, which is then
                read through a memory map.
            code (FeatureCode): The code of the features.
            grid (tuple[int, int]): Patch rows and columns, N = rows * columns.
        """
        self.source, self.code, self.grid = features, code, grid
        self._map: np.ndarray | None = None
        self.is_filled = True

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the memory map, which would be pickled as an array: worker processes open it anew."""
        return {**self.__dict__, "_map": None}

    @property
    def features(self) -> np.ndarray:
        """The array, which may be a memory map."""
        if isinstance(self.source, np.ndarray):
            return self.source
        if self._map is None:
            self._map = np.load(self.source, mmap_mode="r")
        return self._map

    def __len__(self) -> int:
        """Count the images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> np.ndarray:
        """Read the encoded features of an image, shape (layers, N, dim)."""
        return self.features[index]

    def collate_fn(self, items: Sequence[np.ndarray]) -> FeatureBatch:
        """Make a batch of items."""
        return FeatureBatch(torch.from_numpy(np.stack(items)), self.code, self.grid)
