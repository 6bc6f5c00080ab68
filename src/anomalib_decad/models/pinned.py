# SPDX-License-Identifier: Apache-2.0
"""Batches from where a GPU can copy while it computes."""

from dataclasses import replace
from typing import Any

import torch
from anomalib.data import Batch

from anomalib_decad.feature_cache import FeatureBatch

__all__ = ["pinned"]


def pinned(batch: Any) -> Any:
    """Give a batch with its images, or the features in their place, in page-locked memory.

    From other memory a copy to a GPU waits for all that the GPU has to do, and the program waits for the copy.

    Args:
        batch (Any): What a dataloader gives. Only images and features in the machine's memory are copied.

    Returns:
        Any: The batch.

    Raises:
        RuntimeError: If there is no accelerator.
    """
    if isinstance(batch, FeatureBatch) and batch.codes.device.type == "cpu":
        return replace(batch, codes=batch.codes.pin_memory())
    image = getattr(batch, "image", None)
    if isinstance(batch, Batch) and isinstance(image, torch.Tensor) and image.device.type == "cpu":
        return batch.update(image=image.pin_memory())
    return batch
