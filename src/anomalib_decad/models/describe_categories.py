# SPDX-License-Identifier: Apache-2.0
"""What each product's images are like to an encoder."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from anomalib_decad.components import CategoryRecognizer
from anomalib_decad.data import CategoryDataset

__all__ = ["category_names", "describe_categories"]

#: Training images of each product, evenly spaced over all.
_IMAGES = 16

_BATCH_SIZE = 8


def category_names(dataset: Any) -> list[str]:
    """Name the products of a dataset.

    Args:
        dataset (Any): A :class:`CategoryDataset`, or what stands for one (the cache of its features).

    Returns:
        list[str]: Their names in alphabetical order; none of any other dataset.
    """
    images = getattr(dataset, "images", dataset)
    return sorted(images.datasets) if isinstance(images, CategoryDataset) else []


@torch.no_grad()
def describe_categories(dataset: Any, encode: Callable[[Any], Any]) -> dict[str, torch.Tensor]:
    """Describe some normal images of each product.

    Args:
        dataset (Any): Training images, as in :func:`category_names`.
        encode (Callable[[Any], Any]): From a batch of the dataset to the encoder's feature maps.

    Returns:
        dict[str, torch.Tensor]: Descriptors of shape (K, dim) for each product, K at most 16.
    """
    descriptors = {}
    categories = dataset.samples.category.to_numpy()
    for name in category_names(dataset):
        rows = (categories == name).nonzero()[0].tolist()
        count = min(_IMAGES, len(rows))
        chosen = [rows[number * len(rows) // count] for number in range(count)]
        loader: DataLoader = DataLoader(Subset(dataset, chosen), _BATCH_SIZE, collate_fn=dataset.collate_fn)
        descriptors[name] = torch.cat([CategoryRecognizer.describe(encode(batch)) for batch in loader])
    return descriptors
