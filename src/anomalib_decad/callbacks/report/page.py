# SPDX-License-Identifier: Apache-2.0
"""The report as one page of HTML."""

import math
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from anomalib_decad.callbacks.report.charts import loss_chart, product_charts
from anomalib_decad.callbacks.report.pictures import heatmap
from anomalib_decad.callbacks.report.record import Example, ProductRecord
from anomalib_decad.metrics import DECISIONS, MAD, MEAN, METRICS

__all__ = ["render"]

#: Images of all products together: a page of more than some 30 MB is slow to open.
_MAX_IMAGES = 3000
#: Titles of the columns in percent, and how the others are written.
_TITLES = {name: name[0].upper() + name[1:].replace("_", " ") for name in (*METRICS, *DECISIONS)}
_TITLES[MAD] = "mAD"
_FORMATS = dict.fromkeys(("Normal images", "Defect images", "Missed defects", "False alarms"), "{:,.0f}")
_FORMATS["Threshold"] = "{:#.4g}"


def render(
    records: Mapping[str, ProductRecord],
    facts: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, float]] | None,
    decisions: Mapping[str, Mapping[str, float]],
    losses: Mapping[str, Mapping[int, float]],
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
        losses (Mapping[str, Mapping[int, float]]): Value by step, of each loss.
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
        totals=_totals(table, sum(r.counts["images"] for r in records.values()), (metrics or {}).get(MEAN, {})),
        metrics=None if metrics is None else _percent(metrics, (*METRICS, MAD)),
        decisions=table.join(_percent(decisions, DECISIONS), how="outer") if decisions else table,
        mean=MEAN, formats=_FORMATS, heatmap=heatmap, thresholds_from_test=thresholds_from_test,
        ranges={name: (0.0, 1.0) if is_normalized else _range(shown[name]) for name in names},
        charts={name: product_charts(records[name], f"chart-{number}") for number, name in enumerate(names)},
        losses=[loss_chart(name, curve, f"loss-{n}") for n, (name, curve) in enumerate(losses.items(), 1) if curve],
    )  # fmt: skip


def _percent(rows: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> pd.DataFrame:
    values = {name: [100 * row[column] for column in columns] for name, row in rows.items()}
    return pd.DataFrame(values, [_TITLES[column] for column in columns]).T


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


def _totals(table: pd.DataFrame, num_images: int, mean: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Give the figures at the top of the page: title, figure, and what it is of."""
    normal, defect = table["Normal images"].sum(), table["Defect images"].sum()
    kinds = f"{normal:,} normal, {defect:,} defects" if normal + defect else "without labels"
    totals = [("Images tested", f"{num_images:,}", kinds)]
    for title, whole in (("Missed defects", "Defect images"), ("False alarms", "Normal images")):
        known = table.dropna(subset=[title])
        if len(known):
            totals.append((title, f"{known[title].sum():,.0f}", f"of {known[whole].sum():,} {whole.lower()}"))
    over = f"mean of {len(table)} products" if len(table) > 1 else "of one product"
    found = [(_TITLES[key], mean.get(key, math.nan)) for key in ("image_AUROC", "pixel_AUROC", MAD)]
    return totals + [(title, f"{100 * value:.1f} %", over) for title, value in found if not math.isnan(value)]


def _range(examples: list[Example]) -> tuple[float, float]:
    heats = [x.picture.heat for x in examples if x.picture is not None and x.picture.heat is not None]
    return float(min(map(np.min, heats), default=0.0)), float(max(map(np.max, heats), default=1.0))
