# SPDX-License-Identifier: Apache-2.0
"""anomalib's adaptive threshold in bounded memory."""

import logging
from typing import Any

import torch
from anomalib.metrics import AnomalibMetric
from torchmetrics import Metric

from anomalib_decad.metrics.gather import gather
from anomalib_decad.metrics.score_histogram import ScoreHistogram

__all__ = ["HistogramF1Threshold"]

logger = logging.getLogger(__name__)


class _HistogramF1Threshold(Metric):
    """Threshold with the largest F1 score.

    Takes the place of anomalib's ``F1AdaptiveThreshold``, which keeps every pixel of the validation images.

    Args:
        **kwargs (Any): Arguments of ``torchmetrics.Metric``.
    """

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.histogram = ScoreHistogram()

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Add scores ``preds`` with their labels ``target``, two tensors of the same number of elements."""
        self.histogram.update(preds, target)

    def compute(self) -> torch.Tensor:
        """Compute the threshold.

        Without positives it is the largest score, so that nothing normal is flagged; without negatives the smallest.
        """
        gathered = gather(self.histogram)
        self.histogram = ScoreHistogram()
        for histogram in gathered:
            self.histogram.merge(histogram)
        negatives, positives, _ = self.histogram.counts.sum(axis=1)
        if not positives:
            logger.warning("The validation images have no anomaly: the threshold is the largest normal score.")
            return torch.tensor(self.histogram.largest())
        if not negatives:
            logger.warning("The validation images have nothing normal: the threshold is the smallest score.")
            return torch.tensor(self.histogram.smallest())
        return torch.tensor(self.histogram.best_f1()[1])

    def reset(self) -> None:
        """Forget all scores."""
        super().reset()
        self.histogram = ScoreHistogram()


class HistogramF1Threshold(AnomalibMetric, _HistogramF1Threshold):  # type: ignore[misc]
    """:class:`_HistogramF1Threshold` that reads its scores and labels from fields of a batch."""
