# SPDX-License-Identifier: Apache-2.0
"""From scores to decisions: thresholds of each product, and how they are chosen."""

from anomalib_decad.decisions.limits import Limits
from anomalib_decad.decisions.policies import BestF1, FalseAlarmRate, FixedThreshold, ThresholdPolicy
from anomalib_decad.decisions.post_processor import CategoryPostProcessor
from anomalib_decad.decisions.thresholds_file import exported_thresholds

__all__ = [
    "BestF1",
    "CategoryPostProcessor",
    "FalseAlarmRate",
    "FixedThreshold",
    "Limits",
    "ThresholdPolicy",
    "exported_thresholds",
]
