# SPDX-License-Identifier: Apache-2.0
"""The report as one page of HTML."""

import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from anomalib_decad.callbacks.report.charts import draw_charts
from anomalib_decad.callbacks.report.pictures import heatmap
from anomalib_decad.callbacks.report.record import Example, ProductRecord
from anomalib_decad.metrics import DECISIONS, MAD, MEAN, METRICS

__all__ = ["render"]

#: Images of all products together: a page of more than some 30 MB is slow to open.
_MAX_IMAGES = 3000
#: How the columns are written that are not in percent.
_FORMATS = dict.fromkeys(("Normal images", "Defect images", "Missed defects", "False alarms"), "{:,.0f}")
_FORMATS["Threshold"] = "{:#.4g}"


def render(
    records: Mapping[str, ProductRecord],
    facts: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, float]] | None,
    decisions: Mapping[str, Mapping[str, float]],
    max_images: int = 60,
    is_normalized: bool = True,
    thresholds_from_test: bool = False,
) -> str:
    """Write the page.

    Args:
        records (Mapping[str, ProductRecord]): What is kept of each product; at least one.
        facts (Mapping[str, Any]): Facts of the run: ``model``, ``data``, ``date``, ``checkpoint`` (or ``None``), and
            ``tables``, each a title with texts by name.
        metrics (Mapping[str, Mapping[str, float]] | None): The seven metrics and their mean, for each product and for
            ``"mean"``, in [0, 1] or NaN; empty without labels, ``None`` without a :class:`CategoryEvaluator`.
        decisions (Mapping[str, Mapping[str, float]]): F1 score and so on, in the same way.
        max_images (int): Images of each product to show; less of very many products.
        is_normalized (bool): Whether anomaly maps are in [0, 1]. Others are scaled to the range of their product.
        thresholds_from_test (bool): Whether the thresholds were chosen on the test images.

    Returns:
        str: HTML that needs nothing else.
    """
    names = sorted(records)
    limit = max(1, min(max_images, _MAX_IMAGES // len(names)))
    shown = {name: records[name].chosen(limit) for name in names}
    examples = [example for name in names for example in shown[name]]
    try:
        # What is above the data is nobody's business.
        root = os.path.commonpath([Path(example.path).parent for example in examples if example.path])
    except ValueError:  # no paths, or on several drives
        root = ""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["score"] = lambda value: f"{value:#.4g}".rstrip(".")
    environment.filters["relative"] = lambda path: (
        Path(path).relative_to(root).as_posix() if root and path else Path(path).name or "unnamed"
    )
    table = _decision_table(records)
    return environment.from_string(files(__package__).joinpath("template.html").read_text("utf-8")).render(
        facts=facts, records=records, shown=shown, numbers={name: number for number, name in enumerate(names)},
        types=sorted({example.defect_type for example in examples}), num_shown=len(examples),
        has_decisions=any(example.flagged is not None for example in examples),
        has_labels=any(example.kind != "unlabelled" for example in examples),
        is_raw=all(record.is_raw for record in records.values()),
        metrics=None if metrics is None else _percent(metrics, (*METRICS, MAD)),
        decisions=table.join(_percent(decisions, DECISIONS), how="outer") if decisions else table,
        mean=MEAN, formats=_FORMATS, heatmap=heatmap, thresholds_from_test=thresholds_from_test,
        ranges={name: (0.0, 1.0) if is_normalized else _range(shown[name]) for name in names},
        charts={name: draw_charts(records[name]) for name in names},
    )  # fmt: skip


def _percent(rows: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> pd.DataFrame:
    titles = [column if column == MAD else column[0].upper() + column[1:].replace("_", " ") for column in columns]
    return pd.DataFrame({name: [100 * row[column] for column in columns] for name, row in rows.items()}, titles).T


def _decision_table(records: Mapping[str, ProductRecord]) -> pd.DataFrame:
    """Count images and errors of each product; NaN stands for what is not decided."""
    keys = ["normal", "defect", "flagged normal", "flagged defect", "undecided"]
    counts = pd.DataFrame({name: [records[name].counts[key] for key in keys] for name in sorted(records)}, keys).T
    is_decided = counts["undecided"] == 0
    return pd.DataFrame({
        "Normal images": counts["normal"], "Defect images": counts["defect"],
        "Threshold": pd.Series({name: record.threshold for name, record in records.items()}, dtype=float),
        "Missed defects": (counts["defect"] - counts["flagged defect"]).where(is_decided & (counts["defect"] > 0)),
        "False alarms": counts["flagged normal"].where(is_decided & (counts["normal"] > 0)),
    })  # fmt: skip


def _range(examples: list[Example]) -> tuple[float, float]:
    heats = [x.picture.heat for x in examples if x.picture is not None and x.picture.heat is not None]
    return float(min(map(np.min, heats), default=0.0)), float(max(map(np.max, heats), default=1.0))
