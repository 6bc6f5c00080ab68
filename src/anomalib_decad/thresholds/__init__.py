# SPDX-License-Identifier: Apache-2.0
"""From scores to decisions: thresholds of each product, and how they are chosen."""

from anomalib_decad.thresholds.file import exported_thresholds
from anomalib_decad.thresholds.limits import Limits
from anomalib_decad.thresholds.policies import BestF1, FalseAlarmRate, FixedThreshold, ThresholdPolicy
from anomalib_decad.thresholds.post_processor import CategoryPostProcessor

__all__ = [
    "BestF1",
    "CategoryPostProcessor",
    "FalseAlarmRate",
    "FixedThreshold",
    "Limits",
    "ThresholdPolicy",
    "exported_thresholds",
]
