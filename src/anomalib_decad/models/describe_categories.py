# SPDX-License-Identifier: Apache-2.0
"""What each product's images are like to an encoder."""

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
def describe_categories(encoder: Any, dataset: Any, transform: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """Describe some normal images of each product.

    Args:
        encoder (Any): Frozen encoder, from images of shape (B, 3, H, W) to feature maps.
        dataset (Any): Training images, as in :func:`category_names`.
        transform (Any): Transform of the images, or ``None``.
        device (torch.device): Device of the encoder.

    Returns:
        dict[str, torch.Tensor]: Descriptors of shape (K, dim) for each product, K at most 16.
    """
    images: CategoryDataset = getattr(dataset, "images", dataset)
    descriptors = {}
    for name in category_names(dataset):
        rows = images.samples.index[images.samples.category == name].tolist()
        count = min(_IMAGES, len(rows))
        chosen = [rows[number * len(rows) // count] for number in range(count)]
        loader: DataLoader = DataLoader(Subset(images, chosen), _BATCH_SIZE, collate_fn=images.collate_fn)
        batches = [batch.image.to(device) for batch in loader]
        descriptors[name] = torch.cat(
            [CategoryRecognizer.describe(encoder(transform(batch) if transform else batch)) for batch in batches]
        )
    return descriptors
