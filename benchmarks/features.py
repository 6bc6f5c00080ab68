# SPDX-License-Identifier: Apache-2.0
"""Features of the training and test images of a data set, computed once and read by every experiment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from anomalib_decad import DecAD, MultiCategory
from anomalib_decad.feature_cache import FeatureBatch, FeatureCode, FeatureSource, load_or_build

__all__ = ["Split", "chunks", "load"]

# GiB that all feature files together may take.
_LIMIT = 64.0
_BATCH_SIZE = 8


@dataclass
class Split:
    """The features of a split, and what is known of its images.

    Args:
        codes (np.ndarray | torch.Tensor): Encoded features of shape (images, layers, N, dim).
        code (FeatureCode): How they are decoded.
        layers (tuple[int, ...]): The encoder's layers, counted from 1.
        grid (tuple[int, int]): Patch rows and columns, N = rows * columns.
        categories (list[str]): Category of each image.
        labels (torch.Tensor): Whether each image has a defect, shape (images,).
        masks (torch.Tensor): Their defects, booleans of shape (images, height, width).
    """

    codes: np.ndarray | torch.Tensor
    code: FeatureCode
    layers: tuple[int, ...]
    grid: tuple[int, int]
    categories: list[str]
    labels: torch.Tensor
    masks: torch.Tensor

    def batch(self, indices: Sequence[int], layers: Sequence[int]) -> FeatureBatch:
        """Read the features that some layers give of some images."""
        rows = [self.layers.index(layer) for layer in layers]
        if isinstance(self.codes, torch.Tensor):
            codes = self.codes[torch.tensor(indices, device=self.codes.device)][:, rows]
        else:
            codes = torch.from_numpy(np.stack([self.codes[index][rows] for index in indices]))
        return FeatureBatch(codes, FeatureCode(self.code.offset[rows], self.code.scale[rows]), self.grid)

    def of(self, categories: Sequence[str]) -> Split:
        """Keep the images of some categories alone."""
        rows = [row for row, category in enumerate(self.categories) if category in categories]
        if len(rows) == len(self.categories):
            return self
        names = [self.categories[row] for row in rows]
        return replace(self, codes=self.codes[rows], categories=names, labels=self.labels[rows], masks=self.masks[rows])

    def to(self, device: torch.device) -> Split:
        """Keep the features on a device; a CPU reads them from their file."""
        if device.type == "cpu":
            return self
        code = FeatureCode(self.code.offset.to(device), self.code.scale.to(device))
        return replace(self, codes=torch.from_numpy(np.array(self.codes)).to(device), code=code)

    def defect_shares(self, indices: Sequence[int]) -> torch.Tensor:
        """Compute which share of each patch of some images is defect, shape (images, N)."""
        return functional.adaptive_avg_pool2d(self.masks[indices][:, None].float(), self.grid).flatten(1)


def chunks(indices: Sequence[int], length: int) -> list[list[int]]:
    """Cut indices into lists of a length; the last may be shorter."""
    return [list(indices[start : start + length]) for start in range(0, len(indices), length)]


def load(
    model: DecAD, root: Path, categories: Sequence[str] | None, folder: Path, num_workers: int = 0
) -> dict[str, Split]:
    """Find the features of all layers that a model reads, or compute them.

    Args:
        model (DecAD): The model.
        root (Path): Folder in MVTec AD's layout.
        categories (Sequence[str] | None): Names of the categories.
        folder (Path): Folder of the features.
        num_workers (int): Processes that read images.

    Returns:
        dict[str, Split]: The splits ``"train"`` and ``"test"``.
    """
    datamodule = MultiCategory("MVTecAD", root=root, categories=categories, num_workers=0)
    datamodule.setup()
    splits = {name: getattr(datamodule, f"{name}_data") for name in ("train", "test")}
    return {name: _split(model.eval(), data, folder, num_workers) for name, data in splits.items()}


@torch.inference_mode()
def _split(model: DecAD, dataset: Any, folder: Path, num_workers: int) -> Split:
    source = FeatureSource(model, dataset, _BATCH_SIZE, num_workers)
    codes, code = load_or_build(folder, source.key(), source.shape, _LIMIT, source.build)
    return Split(
        codes,
        code,
        model.model.encoder.layers,
        source.grid,
        list(dataset.samples["category"]),
        torch.from_numpy(dataset.samples.label_index.to_numpy()).bool(),
        _masks(dataset, tuple(model.input_size)),
    )


def _masks(dataset: Any, size: tuple[int, int]) -> torch.Tensor:
    masks = torch.zeros(len(dataset), *size, dtype=torch.bool)
    for index, label in enumerate(dataset.samples.label_index):
        if label:
            mask = dataset[index].gt_mask[None, None].float()
            masks[index] = functional.interpolate(mask, size, mode="nearest")[0, 0] > 0
    return masks
