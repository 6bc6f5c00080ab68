# SPDX-License-Identifier: Apache-2.0
"""What the scores of a product are compared with."""

import math
from typing import Any, NamedTuple

import torch

__all__ = ["Limits", "normalize"]


class Limits(NamedTuple):
    """What a product's scores are compared with, in raw scores; NaN where nothing is known.

    Args:
        image_threshold (Any): Higher scores are anomalous images.
        image_min (Any): Smallest score of a validation image.
        image_max (Any): Largest score of a validation image.
        pixel_threshold (Any): Higher scores are defects.
        pixel_min (Any): Smallest score of a pixel.
        pixel_max (Any): Largest score of a pixel.
    """

    image_threshold: Any = math.nan
    image_min: Any = math.nan
    image_max: Any = math.nan
    pixel_threshold: Any = math.nan
    pixel_min: Any = math.nan
    pixel_max: Any = math.nan


def normalize(
    scores: torch.Tensor, threshold: torch.Tensor, smallest: torch.Tensor, largest: torch.Tensor
) -> torch.Tensor:
    """Normalize scores as anomalib does, but those of each image by limits of its own: 0.5 is the threshold.

    Args:
        scores (torch.Tensor): Raw scores of shape (B, ...).
        threshold (torch.Tensor): Thresholds of shape (B,).
        smallest (torch.Tensor): Lower ends of the ranges of scores, shape (B,).
        largest (torch.Tensor): Upper ends, shape (B,). Where they equal the lower ones, a score becomes 0, 0.5 or 1.

    Returns:
        torch.Tensor: Scores in [0, 1], the shape of ``scores``.
    """
    scores = scores.float()  # half precision would round scores to the threshold
    shape = (-1, *(1 for _ in scores.shape[1:]))
    threshold, smallest, largest = (value.to(scores).reshape(shape) for value in (threshold, smallest, largest))
    span = largest - smallest
    has_span = span > 0
    normalized = ((scores - threshold) / torch.where(has_span, span, 1.0) + 0.5).clamp(0, 1)
    one_value = torch.where(scores > threshold, 1.0, torch.where(scores < threshold, 0.0, 0.5)).to(scores.dtype)
    return torch.where(has_span, normalized, one_value)
