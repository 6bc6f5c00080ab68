# SPDX-License-Identifier: Apache-2.0
"""The thresholds beside an exported model, in a file that may be edited."""

import math
from typing import Any

from anomalib_decad.thresholds.post_processor import CategoryPostProcessor

__all__ = ["exported_thresholds"]


def exported_thresholds(post_processor: CategoryPostProcessor) -> dict[str, Any]:
    """Give the thresholds that the scores and maps of an export are to be compared with.

    Args:
        post_processor (CategoryPostProcessor): That of the exported model.

    Returns:
        dict[str, Any]: ``image`` and ``pixel``, the thresholds of all images, and ``categories``, a list of
            dictionaries with ``index``, the value of the output ``category``, ``name``, ``image`` and ``pixel``. The
            ``unit`` is ``"normalized"``, where 0.5 is the threshold that the file has been exported with, or ``"raw"``
            where the export does not normalize scores: ``enable_normalization`` is off, or the model was never
            validated. In the latter case all thresholds are ``None``.
    """
    names = post_processor.categories if post_processor.category is None else [post_processor.category]
    is_raw = not post_processor.enable_normalization or math.isnan(post_processor.limits().image_min)

    def row(name: str | None) -> dict[str, float | None]:
        if is_raw:
            return {kind: post_processor.raw_threshold(kind, name) for kind in ("image", "pixel")}
        return {"image": 1 - post_processor.image_sensitivity, "pixel": 1 - post_processor.pixel_sensitivity}

    categories = [{"index": index, "name": name, **row(name)} for index, name in enumerate(names)]
    return {"unit": "raw" if is_raw else "normalized", **row(None), "categories": categories}
