# SPDX-License-Identifier: Apache-2.0
"""anomalib's post-processor in bounded memory."""

from typing import Any

from anomalib.post_processing import PostProcessor

from anomalib_decad.metrics import HistogramF1Threshold

__all__ = ["BoundedPostProcessor"]


class BoundedPostProcessor(PostProcessor):
    """anomalib's post-processor, but validation does not keep every pixel in memory.

    Normalisation, thresholds and their state are anomalib's; only the pixels behind the threshold are counted in a
    histogram instead of kept.

    Args:
        **kwargs (Any): Arguments of anomalib's ``PostProcessor``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._pixel_threshold_metric = HistogramF1Threshold(  # type: ignore[assignment]
            fields=["anomaly_map", "gt_mask"], strict=False
        )
        self._image_threshold_metric = HistogramF1Threshold(  # type: ignore[assignment]
            fields=["pred_score", "gt_label"], strict=False
        )
