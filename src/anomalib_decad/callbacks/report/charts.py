# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG, drawn by matplotlib in the colors of the page."""

import contextlib
import io
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from anomalib_decad.callbacks.report.record import KINDS, Kind, ProductRecord

__all__ = ["Chart", "loss_chart", "product_charts"]

#: Stand for the variables of the page's CSS of that name, which differ in light and dark mode.
_COLORS = {name: f"#fe00{number:02x}" for number, name in enumerate(
    ("text", "muted", "line", "card", "normal", "defect", "unlabelled"), 1
)}  # fmt: skip
_STYLE = {
    "svg.fonttype": "none", "font.size": 11, "lines.linewidth": 2, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "grid.color": _COLORS["line"], "grid.linewidth": 1, "axes.edgecolor": _COLORS["muted"],
    "axes.labelcolor": _COLORS["muted"], "text.color": _COLORS["muted"],
    **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    **{f"{axis}tick.{kind}.size": 0 for axis in "xy" for kind in ("major", "minor")},
    **{f"{axis}tick.labelcolor": _COLORS["muted"] for axis in "xy"}, "xtick.major.pad": 6, "ytick.major.pad": 6,
}  # fmt: skip
#: Groups (their ids are the same in every figure), fonts, turns by 0 and white space do nothing in the page.
_SHORTER = (
    (r"</?g\b[^>]*>", ""), (r"font(-family|-size)?: [^;\"]*;? ?", ""), (r' transform="rotate\(-?0 [^"]*"', ""),
    (r"xlink:href", "href"), (r"\s+", " "), (r"> <", "><"),
)  # fmt: skip
#: Points of a curve: more would lie within a pixel.
_MAX_POINTS = 300


@dataclass
class Chart:
    """A chart: the content of an SVG element of 360 x 226 units, and the names in its legend by style."""

    title: str
    text: str  # what it shows, for those who cannot see it
    svg: str
    legend: dict[str, str] = field(default_factory=dict)


def product_charts(record: ProductRecord, key: str) -> list[Chart]:
    """Draw scores and, of images of both kinds, ROC and precision over recall; ``key`` makes ids of the SVGs unique."""
    scores = {kind: np.array(record.scores[kind]) for kind in KINDS if len(record.scores[kind])}
    if not scores:
        return []
    charts = [_histogram(scores, record.threshold, f"{key}-scores")]
    if "normal" in scores and "defect" in scores:
        labels = np.repeat([0, 1], [len(scores["normal"]), len(scores["defect"])])
        values = np.concatenate([scores["normal"], scores["defect"]])
        alarms, hits = record.counts["flagged normal"], record.counts["flagged defect"]
        rates = alarms / record.counts["normal"], hits / record.counts["defect"], hits / max(hits + alarms, 1)
        fpr, tpr, _ = roc_curve(labels, values)
        precision, recall, _ = precision_recall_curve(labels, values, drop_intermediate=True)
        decided = not record.counts["undecided"]
        title = f"ROC: AUROC {100 * roc_auc_score(labels, values):.1f} %"
        charts.append(_curve(title, {"false alarm rate": fpr, "recall": tpr}, rates[:2] if decided else None, key))
        title = f"Precision-recall: AP {100 * average_precision_score(labels, values):.1f} %"
        point = rates[1:] if decided and hits + alarms else None  # without an alarm there is no precision
        charts.append(_curve(title, {"recall": recall, "precision": precision}, point, f"{key}-pr"))
    return charts


def loss_chart(name: str, curve: Mapping[int, float], key: str) -> Chart:
    """Draw a loss over steps, its finite values; logarithmic if they span orders of magnitude."""
    values = pd.Series(curve, dtype=float).replace([np.inf, -np.inf], np.nan).dropna()
    low, high = values.min(), values.max()
    text = f"{len(values)} points from step {min(curve):,} to {max(curve):,}, between {low:.4g} and {high:.4g}."
    with _axes("step", "") as axes:
        axes.plot(values.index, values, "o-" if len(values) == 1 else "-", color=_COLORS["normal"], lw=1, alpha=0.4)
        smooth = values.rolling(max(len(values) // 20, 1), center=True, min_periods=1).mean()
        axes.plot(smooth.index, smooth, color=_COLORS["normal"])
        axes.locator_params(axis="x", integer=True, nbins=5)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if high > 30 * low > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        return Chart(name, text, _svg(axes, key))


def _histogram(scores: Mapping[Kind, np.ndarray], threshold: float | None, key: str) -> Chart:
    """Draw the distribution of the scores of each kind of image, and the threshold."""
    # In float32, as the scores: a threshold that differs by less would leave no room for bins.
    line = [np.float32(threshold)] if threshold is not None and math.isfinite(threshold) else []
    edges = np.histogram_bin_edges(np.concatenate([*scores.values(), line]), bins=40)
    legend: dict[str, str] = {kind: "no label" if kind == "unlabelled" else kind for kind in scores}
    parts = [f"{legend[kind]}: {v.min():.4g} to {v.max():.4g}" for kind, v in scores.items()]
    with _axes("score", "share of images") as axes:
        for kind, values in scores.items():
            share = np.histogram(values, edges)[0] / len(values)
            axes.stairs(share, edges, fill=True, color=_COLORS[kind], alpha=0.25, linewidth=0)
            axes.stairs(share, edges, color=_COLORS[kind], linewidth=1.5)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        for place in line:
            axes.axvline(float(place), color=_COLORS["text"], linewidth=1.5, dashes=(4, 3))
            legend["threshold"] = "threshold"
            parts.append(f"threshold: {place:.4g}")
        return Chart("Scores", "; ".join(parts) + ".", _svg(axes, key), legend)


def _curve(title: str, columns: Mapping[str, np.ndarray], point: tuple[float, ...] | None, key: str) -> Chart:
    """Draw a curve from 0 to 1, and the point of the threshold."""
    (x_label, x), (y_label, y) = columns.items()
    kept = np.unique(np.linspace(0, len(x) - 1, _MAX_POINTS).round().astype(int))
    text, legend = "", {}
    with _axes(x_label, y_label) as axes:
        # In steps, as scikit-learn does it: precision is not linear between two thresholds.
        style = "steps-post" if y_label == "precision" else "default"
        axes.plot(x[kept], y[kept], color=_COLORS["normal"], drawstyle=style, clip_on=False)
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        if point is not None:
            axes.plot(*point, "o", markersize=9, mfc=_COLORS["defect"], mec=_COLORS["card"], mew=1.5, clip_on=False)
            text = f"At the threshold: {x_label} {100 * point[0]:.1f} %, {y_label} {100 * point[1]:.1f} %."
            legend["dot"] = "at the threshold"
        return Chart(title, text, _svg(axes, key), legend)


@contextlib.contextmanager
def _axes(x_label: str, y_label: str) -> Iterator[Axes]:
    """Make axes in matplotlib's own style, whatever the user's is, and without pyplot, which would keep the figure."""
    with matplotlib.style.context(["default", _STYLE]):
        axes = Figure(figsize=(360 / 72, 226 / 72)).add_axes((58 / 360, 42 / 226, 284 / 360, 176 / 226))
        axes.set(xlabel=x_label, ylabel=y_label)
        yield axes


def _svg(axes: Axes, key: str) -> str:
    """Write a figure as the content of an SVG element, with ids of its own, which are the same each time."""
    content = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure: Any = axes.figure
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(content, format="svg", transparent=True, metadata=no_metadata)
    # The head is left out: its style would be that of the whole page.
    text = content.getvalue().partition("</defs>")[2].rpartition("</svg>")[0]
    for pattern, replacement in _SHORTER:
        text = re.sub(pattern, replacement, text)
    text = re.sub(r' (d|x|y)="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), text)
    for name, color in _COLORS.items():
        text = text.replace(color, f"var(--{name})")
    return text
