# SPDX-License-Identifier: Apache-2.0
"""The images of several categories as one anomalib dataset, with the category of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataset, ImageBatch, ImageItem, NumpyImageBatch, NumpyImageItem
from anomalib.data.utils import LabelName
from torchvision.tv_tensors import Mask

from anomalib_decad.data.reading import FULL_WHITE, read_image, read_mask

__all__ = ["CategoryBatch", "CategoryDataset", "CategoryItem"]


@dataclass
class _NumpyItem(NumpyImageItem):
    category: str | None = None


@dataclass
class _NumpyBatch(NumpyImageBatch):
    item_class: ClassVar[type[_NumpyItem]] = _NumpyItem
    category: list[str] | None = None


@dataclass
class CategoryItem(ImageItem):
    """Image item that knows its category."""

    numpy_class: ClassVar[type[_NumpyItem]] = _NumpyItem
    category: str | None = None


@dataclass
class CategoryBatch(ImageBatch):
    """Batch of images that knows their categories."""

    item_class: ClassVar[type[CategoryItem]] = CategoryItem
    numpy_class: ClassVar[type[_NumpyBatch]] = _NumpyBatch
    category: list[str] | None = None

    @classmethod
    def collate(cls, items: list[CategoryItem]) -> "CategoryBatch":  # type: ignore[override]
        """Make a batch of items, whose images are resized to the largest.

        A batch has a field only if all of its items have it, apart from the paths of masks, which normal images lack.
        """
        for field in fields(CategoryItem):
            missing = [item for item in items if getattr(item, field.name) is None]
            if 0 < len(missing) < len(items):
                is_path = field.name == "mask_path"
                for item in missing if is_path else items:
                    # Past the validation: anomalib's validator of a path refuses the empty one.
                    item.__dict__[field.name] = "" if is_path else None
        return super().collate(items)  # type: ignore[arg-type, return-value]


class CategoryDataset(AnomalibDataset):
    """Joins datasets of one category each.

    Images and masks are read by :mod:`anomalib_decad.data.reading`; an image may have several masks. ``samples`` has
    one more column, ``category``.

    Args:
        datasets (Mapping[str, AnomalibDataset]): The dataset of each category, by its name.
        white_levels (Mapping[str, float]): The value of white in a category's images of high bit depth.
            Defaults to none: the largest value of 16 bits.
    """

    def __init__(
        self, datasets: Mapping[str, AnomalibDataset], white_levels: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        self.datasets, self.white_levels = dict(datasets), dict(white_levels)
        super().__init__(augmentations=next(iter(self.datasets.values())).augmentations)
        tables = [dataset.samples.assign(category=name) for name, dataset in self.datasets.items()]
        samples = pd.concat(tables, ignore_index=True)
        has_masks = any(dataset.task == TaskType.SEGMENTATION for dataset in self.datasets.values())
        samples.attrs["task"] = (TaskType.SEGMENTATION if has_masks else TaskType.CLASSIFICATION).value
        self.samples = samples

    @property
    def differs_in_masks(self) -> bool:
        """Whether some categories have a mask of each anomalous image, and others do not."""
        anomalous = self.samples[self.samples.label_index == LabelName.ABNORMAL]
        without = {sample.category for _, sample in anomalous.iterrows() if not mask_paths(sample)}
        without |= {name for name, dataset in self.datasets.items() if dataset.task == TaskType.CLASSIFICATION}
        return 0 < len(without) < len(self.datasets)

    def __getitem__(self, index: int) -> CategoryItem:
        """Read the image at an index of ``samples``."""
        sample = self.samples.iloc[index]
        dataset = self.datasets[sample.category]
        image = read_image(sample.image_path, self.white_levels.get(sample.category, FULL_WHITE))
        mask, label, paths = None, int(sample.label_index), mask_paths(sample)
        if dataset.task != TaskType.CLASSIFICATION:
            if label == LabelName.NORMAL:
                mask = Mask(torch.zeros(image.shape[-2:], dtype=torch.uint8))
            elif label == LabelName.ABNORMAL and paths:
                # Masks of one image have one size, or MultiCategory refuses them.
                mask = Mask(torch.stack([read_mask(path) for path in paths]).amax(0))
        if self.augmentations:
            image, mask = self.augmentations(image, mask)
        return CategoryItem(
            image=image,
            gt_mask=mask,
            gt_label=None if label == LabelName.UNKNOWN else torch.tensor(label),
            image_path=str(sample.image_path),
            mask_path=str(paths[0]) if paths else None,
            category=sample.category,
        )

    @property
    def collate_fn(self) -> Callable:
        """Function that makes a :class:`CategoryBatch` of items."""
        return CategoryBatch.collate


def mask_paths(sample: Any) -> list[Any]:
    """List the masks of a row of samples: it has a path, a list of paths, or an empty text, or nothing."""
    value = sample.get("mask_path")
    return value if isinstance(value, list) else [value] if isinstance(value, str | Path) and str(value) else []
