# SPDX-License-Identifier: Apache-2.0
"""Choice of the patches of an image that a model is prepared with."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from anomalib_decad.components.recognition import CategoryRecognizer
from anomalib_decad.components.whitening import at_least_float32, average_features

__all__ = ["PatchSample", "choose_patches", "sample_patches"]

# A patch is drawn by this power of its distance to this many others of its image, at least by this share of the
# largest: patches that are equal have no distance, and are drawn where nothing else is left.
_POWER, _NEIGHBORS, _FLOOR = 3.0, 8, 1e-6


class PatchSample(NamedTuple):
    """Patches of images."""

    #: Their features, shape (I, K, dim), one for each layer, in float32 or wider.
    features: list[torch.Tensor]
    #: What the images are recognized by (:meth:`CategoryRecognizer.describe`), shape (I, D).
    descriptors: torch.Tensor


def choose_patches(embeddings: torch.Tensor, count: int) -> torch.Tensor:
    """Draw patches of each image, by the third power of the distance to the eighth nearest patch of the image.

    An even draw from images of small objects would be background, mostly (``benchmarks/NOTES.md``, "Preparation").

    Args:
        embeddings (torch.Tensor): Embeddings of the patches, shape (B, N, dim).
        count (int): Patches of each image; all where there are not as many.

    Returns:
        torch.Tensor: Their indices, of shape (B, min(count, N)), no patch twice.
    """
    num_patches = embeddings.shape[1]
    neighbors = min(_NEIGHBORS + 1, num_patches)
    # Image by image: the distances of all patches of a batch would take gigabytes where images are large.
    nearest = [torch.cdist(x, x).topk(neighbors, largest=False).values[:, -1] for x in embeddings]
    weights = torch.stack(nearest).pow(_POWER)
    largest = weights.amax(1, keepdim=True)
    weights = torch.where(largest > 0, (weights / largest).clamp(min=_FLOOR), 1.0)
    # The largest u^(1 / w), of uniform numbers u, are a draw without repetition by the weights w.
    keys = torch.rand_like(weights).clamp(min=1e-12).log() / weights
    return keys.topk(min(count, num_patches), dim=1).indices


def sample_patches(batches: Iterable[Sequence[torch.Tensor]], num_images: int, num_patches: int) -> PatchSample:
    """Draw a sample of the patches of images, see :func:`choose_patches`.

    Args:
        batches (Iterable[Sequence[torch.Tensor]]): Feature maps of each batch of images, one for each layer, each of
            shape (B, N, dim). No more batches are taken than are needed.
        num_images (int): Images to draw from; all where there are not as many.
        num_patches (int): Patches to draw from so many images, equally many from each.

    Returns:
        PatchSample: The patches.
    """
    sample: list[torch.Tensor] = []
    descriptors: list[torch.Tensor] = []
    count, of_each = 0, -(-num_patches // num_images)
    for features in batches:
        maps = torch.stack(list(features), dim=2)
        chosen = choose_patches(average_features(features), of_each)
        sample.append(maps[torch.arange(len(maps), device=maps.device)[:, None], chosen])
        descriptors.append(CategoryRecognizer.describe(features))
        count += len(maps)
        if count >= num_images:
            break
    return PatchSample(list(at_least_float32(torch.cat(sample)).unbind(2)), torch.cat(descriptors))
