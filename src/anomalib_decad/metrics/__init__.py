# SPDX-License-Identifier: Apache-2.0
"""The seven metrics of multi-class anomaly detection, for each category, and thresholds, in bounded memory."""

from anomalib_decad.metrics.category_metrics import METRICS, CategoryMetrics, region_weights
from anomalib_decad.metrics.evaluator import CategoryEvaluator
from anomalib_decad.metrics.gather import gather
from anomalib_decad.metrics.post_processor import BoundedPostProcessor
from anomalib_decad.metrics.score_histogram import ScoreHistogram
from anomalib_decad.metrics.threshold import HistogramF1Threshold

__all__ = [
    "METRICS",
    "BoundedPostProcessor",
    "CategoryEvaluator",
    "CategoryMetrics",
    "HistogramF1Threshold",
    "ScoreHistogram",
    "gather",
    "region_weights",
]
