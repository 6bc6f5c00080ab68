# SPDX-License-Identifier: Apache-2.0
"""Training on features that a frozen encoder computes once: in memory, or in files that later runs use again."""

from anomalib_decad.feature_cache.callback import FeatureCaching
from anomalib_decad.feature_cache.codec import FeatureCode
from anomalib_decad.feature_cache.dataset import CachedFeatures, FeatureBatch, IndexBatch
from anomalib_decad.feature_cache.source import FeatureSource
from anomalib_decad.feature_cache.store import FeatureFile, fingerprint

__all__ = [
    "CachedFeatures",
    "FeatureBatch",
    "FeatureCaching",
    "FeatureCode",
    "FeatureFile",
    "FeatureSource",
    "IndexBatch",
    "fingerprint",
]
