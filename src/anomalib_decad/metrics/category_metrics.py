# SPDX-License-Identifier: Apache-2.0
"""The seven metrics of multi-class anomaly detection, for each category."""

import copy
import math
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import torch

from anomalib_decad.metrics.predictions import gather
from anomalib_decad.metrics.score_histogram import ScoreHistogram
from anomalib_decad.ranges import check_range

__all__ = ["MAD", "MEAN", "METRICS", "CategoryMetrics", "region_weights", "with_mean"]

#: The seven metrics, in the order of the literature.
METRICS = ("image_AUROC", "image_AP", "image_F1Max", "pixel_AUROC", "pixel_AP", "pixel_F1Max", "pixel_AUPRO")

#: Mean of the seven metrics, as the literature calls it.
MAD = "mAD"

#: Name of the row that holds the mean over the categories.
MEAN = "mean"


class CategoryMetrics:
    """Image AUROC, AP, F1-max and pixel AUROC, AP, F1-max, AUPRO for each category.

    Memory is bounded: it grows with the number of categories (at most 4 MiB for the pixels of each with the default
    ``max_bins``), not with the number of images.

    Args:
        max_fpr (float): Largest false positive rate of AUPRO.
            Defaults to ``0.3``.
        max_bins (int): Bins of a :class:`ScoreHistogram`.
            Defaults to ``2**17``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, max_fpr: float = 0.3, max_bins: int = 2**17) -> None:
        check_range(0 < max_fpr <= 1, "max_fpr", "in (0, 1]", max_fpr)
        # It checks the number of bins.
        ScoreHistogram(max_bins)
        self.max_fpr = max_fpr
        self.max_bins = max_bins
        self.reset()

    def reset(self) -> None:
        """Forget all scores."""
        self.images: dict[str, ScoreHistogram] = {}
        self.pixels: dict[str, ScoreHistogram] = {}
        self.without_masks: set[str] = set()

    def update(
        self,
        categories: Sequence[str],
        pred_score: torch.Tensor,
        gt_label: torch.Tensor,
        anomaly_map: torch.Tensor | None = None,
        gt_mask: torch.Tensor | None = None,
    ) -> None:
        """Add a batch of predictions.

        Args:
            categories (Sequence[str]): Category of each of the B images.
            pred_score (torch.Tensor): Image scores, B values.
            gt_label (torch.Tensor): True for anomalous images, B values.
            anomaly_map (torch.Tensor | None): Pixel scores of shape (B, H, W) or (B, 1, H, W).
            gt_mask (torch.Tensor | None): True for defect pixels, same shape as ``anomaly_map``.
        """
        scores, labels = pred_score.reshape(len(categories), -1), gt_label.reshape(len(categories), -1)
        for index, category in enumerate(categories):
            self._histogram(self.images, category).update(scores[index], labels[index])
        if anomaly_map is None or gt_mask is None:
            self.without_masks.update(categories)
            return
        masks = gt_mask.reshape(len(categories), *gt_mask.shape[-2:]).bool()
        maps = anomaly_map.reshape(len(categories), *anomaly_map.shape[-2:])
        for category in dict.fromkeys(categories):
            rows = [index for index, name in enumerate(categories) if name == category]
            weights = torch.stack([region_weights(masks[index]) for index in rows])
            self._histogram(self.pixels, category).update(maps[rows], masks[rows], weights)

    def merge(self, other: "CategoryMetrics") -> None:
        """Add the scores of another instance, for example of another process."""
        for mine, theirs in ((self.images, other.images), (self.pixels, other.pixels)):
            for category, histogram in theirs.items():
                self._histogram(mine, category).merge(histogram)
        self.without_masks.update(other.without_masks)

    def synchronize(self) -> None:
        """Gather the scores of all processes of a distributed run into each of them."""
        gathered = gather(copy.copy(self))
        self.reset()
        for other in gathered:
            self.merge(other)

    def compute(self) -> dict[str, dict[str, float]]:
        """Compute the metrics.

        Returns:
            dict[str, dict[str, float]]: For each category in alphabetical order, and for ``"mean"`` over the
                categories, the metrics of :data:`METRICS` and their mean ``"mAD"``, in [0, 1]. NaN stands for one that
                cannot be computed: of a category with only normal or only anomalous images, or where images have no
                masks. Such a category is left out of the mean of that metric.
        """
        table: dict[str, dict[str, float]] = {}
        for category in sorted(self.images):
            image = self.images[category].metrics(self.max_fpr)
            # The metrics of some of a category's images would pass for the metrics of the category.
            is_complete = category in self.pixels and category not in self.without_masks
            pixel = self.pixels[category].metrics(self.max_fpr) if is_complete else {}
            found = {**{f"image_{name}": value for name, value in image.items()},
                     **{f"pixel_{name}": value for name, value in pixel.items()}}  # fmt: skip
            table[category] = {name: found.get(name, math.nan) for name in METRICS}
        # NaN if one of the seven is missing.
        return {name: {**row, MAD: float(np.mean([*row.values()]))} for name, row in with_mean(table, METRICS).items()}

    def _histogram(self, histograms: dict[str, ScoreHistogram], category: str) -> ScoreHistogram:
        return histograms.setdefault(category, ScoreHistogram(self.max_bins))


def region_weights(mask: torch.Tensor) -> torch.Tensor:
    """Weight each defect pixel by one over the area of its region.

    Args:
        mask (torch.Tensor): Booleans of shape (H, W).

    Returns:
        torch.Tensor: Weights of shape (H, W), 0 outside the defects. Those of a region (8-connected) add up to 1.
    """
    pixels = mask.detach().cpu().numpy().astype(np.uint8)
    if not pixels.any():
        return torch.zeros(mask.shape)
    _, regions, stats, _ = cv2.connectedComponentsWithStats(pixels, connectivity=8)
    weights = 1 / np.maximum(stats[:, cv2.CC_STAT_AREA], 1)
    weights[0] = 0
    return torch.from_numpy(weights[regions].astype(np.float32))


def with_mean(table: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """Add the row :data:`MEAN`, the mean of each column over its numbers, to a table that has rows."""
    found = {name: [row[name] for row in table.values() if not math.isnan(row[name])] for name in columns}
    mean = {name: float(np.mean(values)) if values else math.nan for name, values in found.items()}
    rows = {**table, MEAN: mean} if table else {}
    return {name: dict(row) for name, row in rows.items()}
