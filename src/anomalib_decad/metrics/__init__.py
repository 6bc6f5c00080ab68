# SPDX-License-Identifier: Apache-2.0
"""The seven metrics of multi-class anomaly detection, for each category, in bounded memory."""

from anomalib_decad.metrics.category_metrics import METRICS, CategoryMetrics, region_weights
from anomalib_decad.metrics.evaluator import CategoryEvaluator
from anomalib_decad.metrics.gather import gather
from anomalib_decad.metrics.score_histogram import ScoreHistogram

__all__ = [
    "METRICS",
    "CategoryEvaluator",
    "CategoryMetrics",
    "ScoreHistogram",
    "gather",
    "region_weights",
]
