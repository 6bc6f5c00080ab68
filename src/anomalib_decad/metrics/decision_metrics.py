# SPDX-License-Identifier: Apache-2.0
"""How good decisions are: labels of images and masks of defects, for each category."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from anomalib_decad.metrics.category_metrics import with_mean
from anomalib_decad.metrics.predictions import gather

__all__ = ["DECISIONS", "DecisionMetrics"]

#: What is measured of decisions.
DECISIONS = ("label_F1", "label_recall", "label_precision", "false_alarm_rate", "mask_F1")


class DecisionMetrics:
    """Counts right and wrong labels of images and pixels of each category.

    Memory is bounded: eight numbers for each category.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all decisions."""
        #: Of each category: missed, found, rightly normal and falsely alarmed images, and then pixels; shape (2, 4).
        self.counts: dict[str, np.ndarray] = {}

    def update(
        self,
        categories: Sequence[str],
        pred_label: torch.Tensor,
        gt_label: torch.Tensor,
        pred_mask: torch.Tensor | None = None,
        gt_mask: torch.Tensor | None = None,
    ) -> None:
        """Add the decisions on a batch.

        Args:
            categories (Sequence[str]): Category of each of the B images.
            pred_label (torch.Tensor): True for images that are called anomalous, B values.
            gt_label (torch.Tensor): True for anomalous images, B values.
            pred_mask (torch.Tensor | None): True for pixels that are called a defect, shape (B, H, W) or (B, 1, H, W).
            gt_mask (torch.Tensor | None): True for defect pixels, the same shape.
        """
        for kind, (predicted, truth) in enumerate(((pred_label, gt_label), (pred_mask, gt_mask))):
            if predicted is None or truth is None:
                continue
            confusion = _confusion(predicted.reshape(len(categories), -1), truth.reshape(len(categories), -1))
            for name, row in zip(categories, confusion, strict=True):
                self.counts.setdefault(name or "unknown", np.zeros((2, 4)))[kind] += row

    def synchronize(self) -> None:
        """Add up the decisions of all processes of a distributed run in each of them."""
        gathered = gather(self.counts)
        self.reset()
        for category, counts in (item for theirs in gathered for item in theirs.items()):
            self.counts[category] = self.counts.get(category, 0) + counts

    def compute(self) -> dict[str, dict[str, float]]:
        """Compute the metrics.

        Returns:
            dict[str, dict[str, float]]: For each category in alphabetical order, and for ``"mean"`` over the
                categories, the metrics of :data:`DECISIONS` in [0, 1]; nothing without decisions. NaN stands for one
                that cannot be computed, as the recall without an anomalous image, and is left out of the mean.
        """
        table = {}
        for category, (images, pixels) in sorted(self.counts.items()):
            missed, found, right, false = images
            values = _f1(images), _share(found, missed), _share(found, false), _share(false, right), _f1(pixels)
            table[category] = dict(zip(DECISIONS, values, strict=True))
        return with_mean(table, DECISIONS)


def _confusion(predicted: torch.Tensor, truth: torch.Tensor) -> np.ndarray:
    """Count missed, found, rightly normal and falsely alarmed values of each row, shape (B, 4)."""
    predicted, truth = predicted.bool(), truth.bool()
    parts = ~predicted & truth, predicted & truth, ~predicted & ~truth, predicted & ~truth
    return torch.stack([part.sum(1) for part in parts], dim=1).cpu().numpy().astype(float)


def _share(part: float, rest: float) -> float:
    return float(part / (part + rest)) if part + rest else math.nan


def _f1(counts: np.ndarray) -> float:
    """Compute the F1 score; NaN where there is nothing to find."""
    missed, found, _, false = counts
    return float(2 * found / (2 * found + missed + false)) if missed + found else math.nan
