# SPDX-License-Identifier: Apache-2.0
"""From scores to decisions: thresholds of each product, and how they are chosen."""

from anomalib_decad.thresholds.policies import BestF1, FalseAlarmRate, FixedThreshold, ThresholdPolicy
from anomalib_decad.thresholds.post_processor import CategoryPostProcessor, exported_thresholds
from anomalib_decad.thresholds.validation_scores import Limits

__all__ = [
    "BestF1",
    "CategoryPostProcessor",
    "FalseAlarmRate",
    "FixedThreshold",
    "Limits",
    "ThresholdPolicy",
    "exported_thresholds",
]
