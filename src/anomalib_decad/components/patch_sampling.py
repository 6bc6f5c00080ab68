# SPDX-License-Identifier: Apache-2.0
"""Which patches of an image a model is prepared with."""

import torch

__all__ = ["choose_patches"]

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
