# SPDX-License-Identifier: Apache-2.0
"""Post-processing as exports can have it."""

import copy
import logging

from anomalib.post_processing import PostProcessor

__all__ = ["without_unknown_range"]

logger = logging.getLogger(__name__)


def without_unknown_range(post_processor: PostProcessor) -> PostProcessor:
    """Copy a post-processor that has seen no validation without its normalization, which would put NaNs into the graph.

    Predictions stay the same: without the range of the scores, anomalib leaves them as they are. But runtimes that
    simplify a graph fail on limits that are NaN, as OpenVINO 2026.4 does on models of 8-bit integers.

    Args:
        post_processor (PostProcessor): Any of anomalib's post-processors.

    Returns:
        PostProcessor: The copy, or the same if it has seen a validation.
    """
    ranges = (post_processor.image_min, post_processor.image_max, post_processor.pixel_min, post_processor.pixel_max)
    if not post_processor.enable_normalization or not all(bool(value.isnan().all()) for value in ranges):
        return post_processor
    logger.warning(
        "The model was never validated, so it has neither thresholds nor the range of its scores: the export gives "
        "scores and maps as they are, and its labels and masks mean nothing. Export a checkpoint that was saved after "
        "a validation (--trainer.val_check_interval says when these are)."
    )
    copied = copy.copy(post_processor)
    copied.enable_normalization = False
    return copied
