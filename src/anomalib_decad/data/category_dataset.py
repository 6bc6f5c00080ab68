# SPDX-License-Identifier: Apache-2.0
"""The images of several categories as one anomalib dataset."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import pandas as pd
from anomalib import TaskType
from anomalib.data import AnomalibDataset, ImageItem
from torchvision.transforms.v2 import Transform

from anomalib_decad.data.category_batch import CategoryBatch, CategoryItem

__all__ = ["CategoryDataset"]


class CategoryDataset(AnomalibDataset):
    """Joins datasets of one category each.

    Reading an image, its mask and its label is left to the dataset of its category. The joint ``samples`` have two more
    columns: ``category``, and ``position`` in the dataset of the category.

    Args:
        datasets (Mapping[str, AnomalibDataset]): The dataset of each category, by its name.

    Raises:
        ValueError: If ``datasets`` is empty.
    """

    def __init__(self, datasets: Mapping[str, AnomalibDataset]) -> None:
        if not datasets:
            msg = "a CategoryDataset needs at least one dataset"
            raise ValueError(msg)
        self.datasets = dict(datasets)
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
        item = cast("ImageItem", self.datasets[sample.category][sample.position])
        return CategoryItem.from_item(item, sample.category)

    def __add__(self, other_dataset: AnomalibDataset) -> "CategoryDataset":  # type: ignore[override]
        """Refuse: the samples of two joint datasets refer to different datasets of the same category."""
        msg = "a CategoryDataset cannot be added to another; join their datasets instead"
        raise TypeError(msg)

    @property
    def collate_fn(self) -> Callable:
        """Function that makes a :class:`CategoryBatch` of items."""
        return CategoryBatch.collate
