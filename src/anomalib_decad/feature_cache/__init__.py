# SPDX-License-Identifier: Apache-2.0
"""Training on features that a frozen encoder computes once: in memory, or in files that later runs use again."""

from anomalib_decad.feature_cache.callback import FeatureCaching
from anomalib_decad.feature_cache.dataset import CachedFeatures, FeatureBatch, FeatureCode, IndexBatch
from anomalib_decad.feature_cache.source import FeatureSource
from anomalib_decad.feature_cache.store import load_or_build

__all__ = [
    "CachedFeatures", "FeatureBatch", "FeatureCaching", "FeatureCode", "FeatureSource", "IndexBatch", "load_or_build",
]  # fmt: skip
