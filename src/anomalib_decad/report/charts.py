# SPDX-License-Identifier: Apache-2.0
"""Charts as the paths and ticks of an SVG, which the template draws in the colours of the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from anomalib_decad.metrics import ScoreHistogram
from anomalib_decad.report.record import ProductRecord

__all__ = ["Chart", "Series", "histogram_chart", "loss_chart", "precision_recall_chart", "roc_chart"]

#: Size of a chart, and the part of it that has the curves.
_WIDTH, _HEIGHT = 360, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 342, 10, 190

_BINS = 40
#: Points of a curve: more would lie within a pixel.
_MOST_POINTS = 250
#: Largest over smallest value from which an axis is logarithmic.
_LOGARITHMIC = 30.0


@dataclass
class Series:
    """A line or an area of a chart.

    Args:
        kind (str): Style: ``"normal"``, ``"defect"``, ``"unlabelled"``, ``"curve"``, ``"raw"`` or ``"smooth"``.
        path (str): Path of the SVG.
    """

    kind: str
    path: str


@dataclass
class Chart:
    """A chart.

    Args:
        title (str): Its title.
        text (str): What it shows, in words.
        x_label (str): Name of the horizontal axis.
        y_label (str): Name of the vertical axis.
        series (list[Series]): What is drawn.
        x_ticks (list[tuple[float, str]]): Place and text of each tick.
        y_ticks (list[tuple[float, str]]): In the same way.
        line (float | None): Place of a vertical line, the threshold.
        point (tuple[float, float] | None): Place of a point, the threshold's.
    """

    title: str
    text: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    line: float | None = None
    point: tuple[float, float] | None = None
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _RIGHT
    top: int = _TOP
    bottom: int = _BOTTOM


def histogram_chart(record: ProductRecord, threshold: float | None) -> Chart | None:
    """Draw how the scores of the normal images and of the defects are distributed.

    Args:
        record (ProductRecord): The product.
        threshold (float | None): Its threshold.

    Returns:
        Chart | None: The chart; ``None`` without scores.
    """
    groups = [
        ("normal", "normal", record.scores.values(), record.scores.counts[0]),
        ("defect", "defect", record.scores.values(), record.scores.counts[1]),
        ("unlabelled", "unlabelled", record.unlabelled.values(), record.unlabelled.counts[0]),
    ]
    groups = [(kind, name, values[counts > 0], counts[counts > 0]) for kind, name, values, counts in groups]
    groups = [group for group in groups if len(group[2])]
    if not groups:
        return None
    ends = [end for _, _, values, _ in groups for end in (values[0], values[-1])]
    if threshold is not None and math.isfinite(threshold):
        ends.append(threshold)
    low, high = _with_room(min(ends), max(ends))
    edges = np.linspace(low, high, _BINS + 1)
    shares = [np.histogram(values, edges, weights=counts)[0] / counts.sum() for _, _, values, counts in groups]
    x_ticks, y_ticks = _ticks(low, high), _ticks(0, max(float(share.max()) for share in shares), 4)
    top = max(max(y_ticks), *(float(share.max()) for share in shares))
    chart = Chart("Scores", _say_scores(groups, threshold), "score", "share of images")
    for (kind, *_), share in zip(groups, shares, strict=True):
        x = np.repeat(_to_x(edges, low, high), 2)
        y = np.concatenate([[_BOTTOM], np.repeat(_to_y(share, 0, top), 2), [_BOTTOM]])
        chart.series.append(Series(kind, _path(x, y) + "Z"))
    chart.x_ticks = [(float(_to_x(tick, low, high)), f"{tick:g}") for tick in x_ticks]
    chart.y_ticks = [(float(_to_y(tick, 0, top)), f"{100 * tick:g} %") for tick in y_ticks]
    if threshold is not None and low <= threshold <= high:
        chart.line = round(float(_to_x(threshold, low, high)), 1)
    return chart


def roc_chart(record: ProductRecord) -> Chart | None:
    """Draw the receiver operating characteristic: the defects found over the false alarms.

    Args:
        record (ProductRecord): The product.

    Returns:
        Chart | None: The chart; ``None`` if there are not both kinds of images.
    """
    if not _has_both(record.scores):
        return None
    false, true = _found(record.scores)
    area = record.scores.metrics()["AUROC"]
    chart = _unit_chart(
        f"ROC: AUROC {100 * area:.1f} %",
        f"Receiver operating characteristic with an area of {100 * area:.1f} %.",
        "false alarms", "defects found", false, true,
    )  # fmt: skip
    normal, defect = record.counts["normal"], record.counts["defect"]
    if not record.counts["undecided"]:
        share = record.counts["flagged normal"] / normal, record.counts["flagged defect"] / defect
        chart.point = round(float(_to_x(share[0], 0, 1)), 1), round(float(_to_y(share[1], 0, 1)), 1)
        chart.text += f" The threshold has {100 * share[0]:.1f} % false alarms and finds {100 * share[1]:.1f} %."
    return chart


def precision_recall_chart(record: ProductRecord) -> Chart | None:
    """Draw how many alarms are defects over how many defects are found.

    Args:
        record (ProductRecord): The product.

    Returns:
        Chart | None: The chart; ``None`` if there are not both kinds of images.
    """
    if not _has_both(record.scores):
        return None
    negatives, positives, _ = record.scores.counts[:, ::-1]
    hits, alarms = positives.cumsum(), (positives + negatives).cumsum()
    recall, precision = hits / positives.sum(), hits / alarms
    area = record.scores.metrics()["AP"]
    chart = _unit_chart(
        f"Precision and recall: AP {100 * area:.1f} %",
        f"Precision over recall, with an average precision of {100 * area:.1f} %.",
        "defects found", "alarms that are defects",
        np.concatenate([[0], recall]), np.concatenate([precision[:1], precision]),
    )  # fmt: skip
    found, false = record.counts["flagged defect"], record.counts["flagged normal"]
    if not record.counts["undecided"] and found:
        share = found / record.counts["defect"], found / (found + false)
        chart.point = round(float(_to_x(share[0], 0, 1)), 1), round(float(_to_y(share[1], 0, 1)), 1)
        chart.text += f" The threshold finds {100 * share[0]:.1f} %; {100 * share[1]:.1f} % of its alarms are right."
    return chart


def loss_chart(name: str, points: Sequence[tuple[int, float]]) -> Chart:
    """Draw the course of a loss.

    Args:
        name (str): Its name.
        points (Sequence[tuple[int, float]]): Steps and values, at least one.

    Returns:
        Chart: The chart, with a logarithmic axis if the values span orders of magnitude.
    """
    steps, values = (np.array(column, float) for column in zip(*points, strict=True))
    is_logarithmic = values.min() > 0 and values.max() / values.min() > _LOGARITHMIC
    text = f"{name} over {len(points)} points from step {steps[0]:g} to {steps[-1]:g}: from {values[0]:.4g} to "
    text += f"{values[-1]:.4g}, between {values.min():.4g} and {values.max():.4g}."
    chart = Chart(name, text, "step", "logarithmic" if is_logarithmic else "")
    shown = np.log10(values) if is_logarithmic else values
    low, high = _with_room(float(shown.min()), float(shown.max()))
    left, right = _with_room(float(steps[0]), float(steps[-1]), 0.0)
    x, y = _to_x(steps, left, right), _to_y(shown, low, high)
    kept = _thin(x, y, 2 * _MOST_POINTS)
    is_long = len(points) > 60
    chart.series.append(Series("raw" if is_long else "smooth", _path(x[kept], y[kept])))
    if is_long:
        smooth = _smooth(y, max(len(y) // 40, 3))
        kept = _thin(x, smooth, _MOST_POINTS)
        chart.series.append(Series("smooth", _path(x[kept], smooth[kept])))
    chart.x_ticks = [(float(_to_x(t, left, right)), f"{t:,g}") for t in _ticks(left, right, 4) if t == int(t)]
    if is_logarithmic:
        y_ticks = [(tick, f"{10.0**tick:g}") for tick in range(math.ceil(low), math.floor(high) + 1)]
    else:
        y_ticks = [(tick, f"{tick:g}") for tick in _ticks(low, high, 4)]  # type: ignore[misc]
    chart.y_ticks = [(float(_to_y(tick, low, high)), label) for tick, label in y_ticks]
    return chart


def _say_scores(groups: Sequence[tuple[str, str, np.ndarray, np.ndarray]], threshold: float | None) -> str:
    parts = [
        f"The scores of {int(counts.sum())} {name} images lie between {values[0]:.4g} and {values[-1]:.4g}"
        for _, name, values, counts in groups
    ]
    parts.append("there is no threshold" if threshold is None else f"the threshold is {threshold:.4g}")
    return "; ".join(parts) + "."


def _has_both(scores: ScoreHistogram) -> bool:
    negatives, positives, _ = scores.counts.sum(axis=1)
    return bool(negatives and positives)


def _found(scores: ScoreHistogram) -> tuple[np.ndarray, np.ndarray]:
    """Give the rates of false and of true positives for all thresholds, from the highest downwards."""
    negatives, positives, _ = scores.counts[:, ::-1]
    rates = (np.concatenate([[0], counts.cumsum() / counts.sum()]) for counts in (negatives, positives))
    false, true = rates
    return false, true


def _unit_chart(title: str, text: str, x_label: str, y_label: str, x: np.ndarray, y: np.ndarray) -> Chart:
    chart = Chart(title, text, x_label, y_label)
    across, up = _to_x(x, 0, 1), _to_y(y, 0, 1)
    kept = _thin(across, up, _MOST_POINTS)
    chart.series.append(Series("curve", _path(across[kept], up[kept])))
    ticks = (0, 0.25, 0.5, 0.75, 1)
    chart.x_ticks = [(float(_to_x(tick, 0, 1)), f"{100 * tick:g} %") for tick in ticks]
    chart.y_ticks = [(float(_to_y(tick, 0, 1)), f"{100 * tick:g} %") for tick in ticks]
    return chart


def _thin(x: np.ndarray, y: np.ndarray, count: int) -> np.ndarray:
    """Choose at most so many points that are evenly apart along a curve, with both ends."""
    if len(x) <= count:
        return np.arange(len(x))
    along = np.concatenate([[0], np.hypot(np.diff(x), np.diff(y)).cumsum()])
    chosen = np.searchsorted(along, np.linspace(0, along[-1], count - 1))
    return np.unique(np.append(np.minimum(chosen, len(x) - 1), len(x) - 1))


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Average over neighbours, fewer at the ends."""
    sums = np.concatenate([[0], values.cumsum()])
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), window)
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def _with_room(low: float, high: float, room: float = 0.03) -> tuple[float, float]:
    """Widen a range a little, and give one of no width some."""
    extent = high - low or abs(high) or 1.0
    return (low - room * extent, high + room * extent) if high > low else (low - extent / 2, high + extent / 2)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Choose round numbers within a range."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.6g}") for index in range(first, last + 1)]


def _to_x(value: np.ndarray | float, low: float, high: float) -> np.ndarray:
    return _LEFT + (np.asarray(value) - low) / (high - low) * (_RIGHT - _LEFT)


def _to_y(value: np.ndarray | float, low: float, high: float) -> np.ndarray:
    return _BOTTOM - (np.asarray(value) - low) / (high - low) * (_BOTTOM - _TOP)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{across:.1f} {up:.1f}" for across, up in zip(x, y, strict=True))
