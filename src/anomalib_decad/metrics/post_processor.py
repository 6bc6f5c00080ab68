# SPDX-License-Identifier: Apache-2.0
"""anomalib's post-processor in bounded memory."""

from typing import Any

from anomalib.post_processing import PostProcessor

from anomalib_decad.compat import replace_threshold_metrics
from anomalib_decad.metrics.threshold import HistogramF1Threshold

__all__ = ["BoundedPostProcessor"]


class BoundedPostProcessor(PostProcessor):
    """anomalib's post-processor, but validation does not keep every pixel in memory.

    Normalization, thresholds and their state are anomalib's; only the pixels behind the threshold are counted in a
    histogram instead of kept.

    Args:
        **kwargs (Any): Arguments of anomalib's ``PostProcessor``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        replace_threshold_metrics(
            self,
            image=HistogramF1Threshold(fields=["pred_score", "gt_label"], strict=False),
            pixel=HistogramF1Threshold(fields=["anomaly_map", "gt_mask"], strict=False),
        )
