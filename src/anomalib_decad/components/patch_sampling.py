# SPDX-License-Identifier: Apache-2.0
"""Which patches of an image a model is prepared with."""

from collections.abc import Callable, Iterable, Sequence

import torch

from anomalib_decad.components.precision import at_least_float32
from anomalib_decad.components.whitening import average_features

__all__ = ["choose_patches", "sample_patches"]

# A patch is as rare as its distance to this many others of its image, ...
_NEIGHBORS = 8

# ... and is drawn by this power of it.
_POWER = 3.0

# Of the largest weight: patches that are equal have none, and are drawn where nothing else is left.
_FLOOR = 1e-6


def choose_patches(embeddings: torch.Tensor, count: int) -> torch.Tensor:
    """Draw patches of each image, those rather that have few like them in it.

    Most patches of a small object's image are background. A sample that is drawn evenly is background, too, and
    prototypes of it do not know the object. Here a patch is drawn by the third power of its distance to the eighth
    nearest patch of its image (``benchmarks/NOTES.md``, "Preparation").

    Args:
        embeddings (torch.Tensor): Embeddings of the patches, shape (B, N, dim).
        count (int): How many of each image; all where there are not as many.

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


def sample_patches(
    batches: Iterable[Sequence[torch.Tensor]],
    num_images: int,
    num_patches: int,
    report: Callable[[float], None] | None = None,
) -> list[torch.Tensor]:
    """Draw a sample of the patches of images, see :func:`choose_patches`.

    Args:
        batches (Iterable[Sequence[torch.Tensor]]): Feature maps of each batch of images, each of shape (B, N, dim), one
            for each layer. No more are asked for than are needed.
        num_images (int): How many images to draw from; all where there are not as many.
        num_patches (int): How many patches to draw from so many images, equally many from each.
        report (Callable[[float], None] | None): Is told after each batch which part has been done, in [0, 1].
            Defaults to ``None``: nobody is.

    Returns:
        list[torch.Tensor]: Features of shape (K, dim), one for each layer, in float32 or wider.
    """
    sample: list[torch.Tensor] = []
    count, of_each = 0, -(-num_patches // num_images)
    for features in batches:
        maps = torch.stack(list(features), dim=2)
        chosen = choose_patches(average_features(features), of_each)
        sample.append(maps[torch.arange(len(maps), device=maps.device)[:, None], chosen].flatten(0, 1))
        count += len(maps)
        if report is not None:
            report(min(count / num_images, 1.0))
        if count >= num_images:
            break
    return list(at_least_float32(torch.cat(sample)).unbind(1))
