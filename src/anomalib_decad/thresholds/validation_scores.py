# SPDX-License-Identifier: Apache-2.0
"""Scores of a validation, and the limits that follow from them."""

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from anomalib_decad.metrics import ScoreHistogram, gather, raw_scores_of
from anomalib_decad.thresholds.policies import FalseAlarmRate, ThresholdPolicy

__all__ = ["Limits", "ValidationScores"]

logger = logging.getLogger(__name__)


class Limits(NamedTuple):
    """What a product's scores are compared with, in raw scores; NaN where nothing is known.

    Images and pixels with higher scores than the threshold are anomalous; the smallest and largest scores are those of
    a validation's images and pixels.
    """

    image_threshold: Any = math.nan
    image_min: Any = math.nan
    image_max: Any = math.nan
    pixel_threshold: Any = math.nan
    pixel_min: Any = math.nan
    pixel_max: Any = math.nan


@dataclass
class _Scores:
    """Scores of images or pixels: those with labels counted, the range of all."""

    histogram: ScoreHistogram = field(default_factory=ScoreHistogram)
    smallest: float = math.inf
    largest: float = -math.inf

    def update(self, scores: torch.Tensor, labels: torch.Tensor | None) -> None:
        if labels is not None:
            self.histogram.update(scores, labels)
        self.smallest = min(self.smallest, float(scores.min()))
        self.largest = max(self.largest, float(scores.max()))

    def merge(self, other: "_Scores") -> None:
        self.smallest, self.largest = min(self.smallest, other.smallest), max(self.largest, other.largest)
        self.histogram.merge(other.histogram)

    def range(self) -> tuple[float, float]:
        return (self.smallest, self.largest) if self.smallest <= self.largest else (math.nan, math.nan)

    def policy(self, policy: ThresholdPolicy) -> ThresholdPolicy:
        """Give the policy for scores with or without defects."""
        negatives, positives = self.histogram.totals()
        return policy.without_defects() if negatives and not positives else policy

    def threshold(self, policy: ThresholdPolicy) -> float:
        """Choose the threshold; if all is anomalous, below the smallest score, so that nothing is missed."""
        threshold = self.policy(policy).choose(self.histogram)
        negatives, positives = self.histogram.totals()
        if math.isnan(threshold) and positives and not negatives:
            return self.histogram.below(self.histogram.smallest())
        return threshold


class ValidationScores:
    """Counts the scores of each product's images and pixels, in bounded memory, and finds its limits.

    Memory is that of two histograms for each product, at most 8 MiB.
    """

    def __init__(self) -> None:
        #: Scores of images and of pixels by product; ``None`` stands for images whose product nobody knows.
        self.products: dict[str | None, tuple[_Scores, _Scores]] = {}

    def update(self, batch: Any) -> None:
        """Add the raw scores of a batch, with labels and masks where there are some."""
        names = getattr(batch, "category", None) or [None] * len(batch.image)
        scores, maps = raw_scores_of(batch), batch.anomaly_map
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            images, pixels = self.products.setdefault(name, (_Scores(), _Scores()))
            if scores is not None:
                images.update(scores[rows], None if batch.gt_label is None else batch.gt_label[rows])
            if maps is not None:
                chosen = maps.reshape(len(names), -1)[rows]
                masks = None if batch.gt_mask is None else batch.gt_mask.reshape(len(names), -1)[rows]
                pixels.update(chosen, masks)

    def synchronize(self) -> None:
        """Gather the scores of all processes of a distributed run into each of them."""
        gathered = gather(self.products)
        self.products = {}
        for name, found in (item for theirs in gathered for item in theirs.items()):
            for mine, theirs in zip(self.products.setdefault(name, (_Scores(), _Scores())), found, strict=True):
                mine.merge(theirs)

    def limits(
        self, image_policy: ThresholdPolicy, pixel_policy: ThresholdPolicy, matches: bool
    ) -> tuple[Limits, dict[str, Limits]]:
        """Find the limits.

        Args:
            image_policy (ThresholdPolicy): How thresholds of images are chosen.
            pixel_policy (ThresholdPolicy): How those of pixels are.
            matches (bool): Whether a threshold that cannot be chosen is the other one.

        Returns:
            tuple[Limits, dict[str, Limits]]: Those of all products together, and of each. A product has those of all
                together for what its images do not tell.
        """
        joint = _Scores(), _Scores()
        for found in self.products.values():
            for whole, part in zip(joint, found, strict=True):
                whole.merge(part)
        every = _limits_of(joint, image_policy, pixel_policy, matches)
        limits = {
            name: _filled(_limits_of(product, image_policy, pixel_policy, matches), every)
            for name, product in self.products.items()
            if name is not None
        }
        return every, limits

    def warn_about_missing(self, policy: ThresholdPolicy, names: Sequence[str], kept: Collection[str] = ()) -> None:
        """Log where a threshold of images could not be chosen as the policy has it.

        Args:
            policy (ThresholdPolicy): How thresholds of images are chosen.
            names (Sequence[str]): All products that the model knows.
            kept (Collection[str]): Those that have thresholds from before.
        """
        missing = [name for name in names if name not in self.products]
        _warn("No validation image of %s: the thresholds are those of all products together.",
              [name for name in missing if name not in kept])  # fmt: skip
        _warn("No validation image of %s: the thresholds are as they were before.",
              [name for name in missing if name in kept])  # fmt: skip
        without, few, only = [], [], []
        for name, (images, _) in self.products.items():
            negatives, positives = images.histogram.totals()
            used = images.policy(policy)
            if used is not policy:
                without.append(name)
            if isinstance(used, FalseAlarmRate) and negatives and used.is_extrapolated(images.histogram):
                few.append(name)
            if positives and not negatives:
                only.append(name)
        rate = getattr(policy.without_defects(), "rate", math.nan)
        _warn("No defect among the validation images of %s: the threshold is what normal images exceed with a "
              f"probability of {rate:g}.", without)  # fmt: skip
        _warn("Too few normal validation images of %s for such a rate: the threshold is estimated from their mean and "
              "spread. More normal images, or a larger rate, make it surer.", few)  # fmt: skip
        _warn("Nothing normal among the validation images of %s: the threshold is just below their smallest score.",
              only)  # fmt: skip


def _limits_of(
    product: tuple[_Scores, _Scores], image_policy: ThresholdPolicy, pixel_policy: ThresholdPolicy, matches: bool
) -> Limits:
    images, pixels = product
    image, pixel = images.threshold(image_policy), pixels.threshold(pixel_policy)
    if matches:
        image, pixel = pixel if math.isnan(image) else image, image if math.isnan(pixel) else pixel
    return Limits(image, *images.range(), pixel, *pixels.range())


def _filled(limits: Limits, fallback: Limits) -> Limits:
    return Limits(*(other if math.isnan(value) else value for value, other in zip(limits, fallback, strict=True)))


def _warn(message: str, names: Sequence[str | None]) -> None:
    if names:
        logger.warning(message, ", ".join(name or "the product" for name in names))
