# SPDX-License-Identifier: Apache-2.0
"""The seven metrics of multi-class anomaly detection, for each category, in bounded memory."""

from anomalib_decad.metrics.category_metrics import MAD, MEAN, METRICS, CategoryMetrics, region_weights
from anomalib_decad.metrics.decision_metrics import DECISIONS, DecisionMetrics
from anomalib_decad.metrics.evaluator import CategoryEvaluator
from anomalib_decad.metrics.predictions import (
    categories_of,
    gather,
    lacks_threshold,
    num_own_images,
    own_images,
    raw_maps_of,
    raw_scores_of,
)
from anomalib_decad.metrics.score_histogram import ScoreHistogram

__all__ = [
    "DECISIONS",
    "MAD",
    "MEAN",
    "METRICS",
    "CategoryEvaluator",
    "CategoryMetrics",
    "DecisionMetrics",
    "ScoreHistogram",
    "categories_of",
    "gather",
    "lacks_threshold",
    "num_own_images",
    "own_images",
    "raw_maps_of",
    "raw_scores_of",
    "region_weights",
]
