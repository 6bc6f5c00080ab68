# SPDX-License-Identifier: Apache-2.0
"""The thresholds beside an exported model, in a file that may be edited."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from anomalib_decad.decisions.post_processor import CategoryPostProcessor

__all__ = ["RANGES", "exported_thresholds", "is_threshold", "read_thresholds"]

_NORMALIZED, _RAW = "normalized", "raw"

#: What the scores of an export are, by their unit.
RANGES = {_NORMALIZED: "in [0, 1]", _RAW: "finite"}


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
    known = [name if name in post_processor.categories else None for name in (None, *names)]
    limits = [post_processor.limits(name) for name in known]
    image, pixel = post_processor.image_sensitivity, post_processor.pixel_sensitivity
    is_raw = not post_processor.enable_normalization or math.isnan(limits[0].image_min)
    rows: list[dict[str, Any]] = [
        {"image": row.raw_threshold("image", image), "pixel": row.raw_threshold("pixel", pixel)}
        if is_raw
        else {"image": 1 - image, "pixel": 1 - pixel}
        for row in limits
    ]
    categories = [{"index": index, "name": name, **rows[1 + index]} for index, name in enumerate(names)]
    return {"unit": _RAW if is_raw else _NORMALIZED, **rows[0], "categories": categories}


def read_thresholds(path: Path) -> dict[str, Any]:
    """Read the file of thresholds.

    Args:
        path (Path): The file.

    Returns:
        dict[str, Any]: What :func:`exported_thresholds` gave, edited or not.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds anything else.
    """
    try:
        # Some editors begin a file with a mark of its encoding.
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        msg = f"no JSON: {error}"
        raise ValueError(msg) from error
    is_whole = isinstance(content, dict) and isinstance(content.get("categories"), list)
    unit = str(content.setdefault("unit", _NORMALIZED)) if is_whole else ""
    rows = [content, *content["categories"]] if unit in RANGES else []
    if not rows or not all(
        isinstance(row, dict) and all(is_threshold(row.get(kind, math.nan), unit) for kind in ("image", "pixel"))
        for row in rows
    ):
        msg = (
            f"no thresholds of an export: a dictionary with image, pixel and categories, numbers {RANGES[_NORMALIZED]}"
        )
        raise ValueError(msg)
    names = [row.get("name") for row in content["categories"]]
    indices = [row.get("index", number) for number, row in enumerate(content["categories"])]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        msg = "each category needs a name of its own"
        raise ValueError(msg)
    if not all(isinstance(index, int) for index in indices) or len(set(indices)) < len(indices):
        msg = "each category needs the index that it was exported with"
        raise ValueError(msg)
    return content


def is_threshold(value: Any, unit: str) -> bool:
    """Tell whether a value can be a threshold.

    Args:
        value (Any): The value; ``None`` is that of an export without thresholds.
        unit (str): Unit of the scores, one of :data:`RANGES`.

    Returns:
        bool: Whether it is a number that scores may have, or ``None`` among raw scores.
    """
    if value is None:
        return unit == _RAW
    if not isinstance(value, int | float) or abs(value) > sys.float_info.max or math.isnan(value):
        return False
    return unit == _RAW or 0 <= value <= 1
