# SPDX-License-Identifier: Apache-2.0
"""The seven metrics of multi-class anomaly detection, for each category, in bounded memory."""

from anomalib_decad.metrics.callback_order import put_before_post_processor, put_last
from anomalib_decad.metrics.category_metrics import MEAN, METRICS, CategoryMetrics, region_weights
from anomalib_decad.metrics.decision_metrics import DECISIONS, DecisionMetrics
from anomalib_decad.metrics.evaluator import MEAN_OF_SEVEN, CategoryEvaluator, categories_of
from anomalib_decad.metrics.gather import gather
from anomalib_decad.metrics.raw_scores import RawScores, lacks_threshold, score_of, threshold_of
from anomalib_decad.metrics.repeated_images import num_own_images, without_repeated
from anomalib_decad.metrics.score_histogram import ScoreHistogram

__all__ = [
    "DECISIONS",
    "MEAN",
    "MEAN_OF_SEVEN",
    "METRICS",
    "CategoryEvaluator",
    "CategoryMetrics",
    "DecisionMetrics",
    "RawScores",
    "ScoreHistogram",
    "categories_of",
    "gather",
    "lacks_threshold",
    "num_own_images",
    "put_before_post_processor",
    "put_last",
    "region_weights",
    "score_of",
    "threshold_of",
    "without_repeated",
]
