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

__all__ = ["CachedFeatures", "FeatureBatch", "IndexBatch"]


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


@dataclass
class IndexBatch:
    """Which rows of features that are already on the device make a batch.

    Args:
        indices (torch.Tensor): Indices of images, shape (B,).
    """

    indices: torch.Tensor
    image: None = None
    gt_mask: None = None


class CachedFeatures(Dataset):
    """Dataset of features, in the place of a dataset of images; :meth:`fill` gives it the features.

    Args:
        images (Any): The anomalib dataset of images.
    """

    def __init__(self, images: Any) -> None:
        self.images = images
        self.samples = images.samples
        self.is_filled = False

    def fill(self, features: np.ndarray | Path | None, code: FeatureCode, grid: tuple[int, int]) -> None:
        """Set the features.

        Args:
            features (np.ndarray | Path | None): float16 of shape (images, layers, N, dim), or a file of them, which is
                then read through a memory map; ``None`` for a dataset of indices.
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
        if self.source is None:
            msg = "a dataset of indices holds no features"
            raise TypeError(msg)
        if self._map is None:
            self._map = np.load(self.source, mmap_mode="r")
        return self._map

    def __len__(self) -> int:
        """Count the images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> np.ndarray | int:
        """Read the encoded features of an image, shape (layers, N, dim), or give its index."""
        return index if self.source is None else self.features[index]

    def collate_fn(self, items: Sequence[Any]) -> FeatureBatch | IndexBatch:
        """Make a batch of items."""
        if self.source is None:
            return IndexBatch(torch.tensor(items))
        return FeatureBatch(torch.from_numpy(np.stack(items)), self.code, self.grid)
