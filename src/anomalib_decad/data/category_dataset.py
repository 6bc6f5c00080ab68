# SPDX-License-Identifier: Apache-2.0
"""The images of several categories as one anomalib dataset."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataset, ImageItem
from anomalib.data.utils import LabelName
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Mask

from anomalib_decad.data.category_batch import CategoryBatch, CategoryItem
from anomalib_decad.data.reading import FULL_WHITE, read_image, read_mask

__all__ = ["CategoryDataset"]


class CategoryDataset(AnomalibDataset):
    """Joins datasets of one category each.

    Images and masks are read as anomalib does, but those of more than 8 bits are scaled, masks may be noisy, and an
    image may have several masks or none. Datasets that read their items in a way of their own do it here, too. The
    joint ``samples`` have two more columns: ``category``, and ``position`` in the dataset of the category.

    Args:
        datasets (Mapping[str, AnomalibDataset]): The dataset of each category, by its name.
        whites (Mapping[str, float]): The value of white in a category's images of more than 8 bits.
            Defaults to none: the largest value of 16 bits.

    Raises:
        ValueError: If ``datasets`` is empty.
    """

    def __init__(
        self, datasets: Mapping[str, AnomalibDataset], whites: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        if not datasets:
            msg = "a CategoryDataset needs at least one dataset"
            raise ValueError(msg)
        self.datasets = dict(datasets)
        self.whites = dict(whites)
        first = next(iter(self.datasets.values()))
        super().__init__(augmentations=first.augmentations)
        samples = pd.concat(
            [
                dataset.samples.assign(category=category, position=range(len(dataset)))
                for category, dataset in self.datasets.items()
            ],
            ignore_index=True,
        )
        segmentation = any(dataset.task == TaskType.SEGMENTATION for dataset in self.datasets.values())
        samples.attrs["task"] = (TaskType.SEGMENTATION if segmentation else TaskType.CLASSIFICATION).value
        self.samples = samples

    @property
    def augmentations(self) -> Transform | None:
        """Augmentations of the images, those of every category's dataset."""
        return self._augmentations

    @augmentations.setter
    def augmentations(self, augmentations: Transform | None) -> None:
        self._augmentations = augmentations
        for dataset in self.datasets.values():
            dataset.augmentations = augmentations

    @property
    def differs_in_masks(self) -> bool:
        """Whether some categories have a mask of each anomalous image, and others do not."""
        samples = self.samples
        has_masks = {name: dataset.task != TaskType.CLASSIFICATION for name, dataset in self.datasets.items()}
        paths = samples["mask_path"] if "mask_path" in samples else [None] * len(samples)
        for category, label, path in zip(samples["category"], samples["label_index"], paths, strict=True):
            if label == LabelName.ABNORMAL and not _paths_of(path):
                has_masks[category] = False
        return len(set(has_masks.values())) > 1

    def subsample(self, indices: Sequence[int], inplace: bool = False) -> "CategoryDataset":
        """Keep only some of the samples.

        Args:
            indices (Sequence[int]): Positions in ``samples``, without duplicates.
            inplace (bool): Change this dataset instead of a copy.

        Returns:
            CategoryDataset: The smaller dataset; its categories' datasets are shared with this one.

        Raises:
            ValueError: If an index stands twice.
        """
        dataset = self if inplace else copy.copy(self)
        super(CategoryDataset, dataset).subsample(indices, inplace=True)
        return dataset

    def __getitem__(self, index: int) -> CategoryItem:
        """Read the image at an index of ``samples``."""
        sample = self.samples.iloc[index]
        dataset = self.datasets[sample.category]
        if type(dataset).__getitem__ is not AnomalibDataset.__getitem__:
            return CategoryItem.from_item(cast("ImageItem", dataset[sample.position]), sample.category)
        image, mask = read_image(sample.image_path, self.whites.get(sample.category, FULL_WHITE)), None
        label = int(sample.label_index)
        paths = _paths_of(sample.get("mask_path"))
        if dataset.task != TaskType.CLASSIFICATION:
            if label == LabelName.NORMAL:
                mask = Mask(torch.zeros(image.shape[-2:], dtype=torch.uint8))
            elif label == LabelName.ABNORMAL and paths:
                # Masks of one image have one size, or MultiCategory refuses them.
                mask = Mask(torch.stack([read_mask(path) for path in paths]).amax(0))
        if self.augmentations and mask is not None:
            image, mask = self.augmentations(image, mask)
        elif self.augmentations:
            image = self.augmentations(image)
        return CategoryItem(
            image=image,
            gt_mask=mask,
            gt_label=None if label == LabelName.UNKNOWN else torch.tensor(label),
            image_path=str(sample.image_path),
            mask_path=str(paths[0]) if paths else None,
            category=sample.category,
        )

    def __add__(self, other_dataset: AnomalibDataset) -> "CategoryDataset":  # type: ignore[override]
        """Refuse: the samples of two joint datasets refer to different datasets of the same category."""
        msg = "a CategoryDataset cannot be added to another; join their datasets instead"
        raise TypeError(msg)

    @property
    def collate_fn(self) -> Callable:
        """Function that makes a :class:`CategoryBatch` of items."""
        return CategoryBatch.collate


def _paths_of(value: Any) -> list[Any]:
    """List the paths of an image's masks: a product without masks has paths that are empty, or no paths."""
    return value if isinstance(value, list) else [value] if isinstance(value, str | Path) and str(value) else []
