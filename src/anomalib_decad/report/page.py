# SPDX-License-Identifier: Apache-2.0
"""The report as one page of HTML."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from anomalib_decad.metrics import MEAN, MEAN_OF_SEVEN, METRICS
from anomalib_decad.report.charts import Chart, histogram_chart, loss_chart, precision_recall_chart, roc_chart
from anomalib_decad.report.facts import Facts
from anomalib_decad.report.pictures import data_uri, heatmap
from anomalib_decad.report.record import Example, ProductRecord

__all__ = ["render"]

#: Images of all products together: a page of more than some 30 MB is slow to open.
_MOST_IMAGES = 3000

#: A dash, in the place of a number.
_MISSING = "\N{EN DASH}"
_TITLES = {
    "image_AUROC": "Image AUROC",
    "image_AP": "Image AP",
    "image_F1Max": "Image F1-max",
    "pixel_AUROC": "Pixel AUROC",
    "pixel_AP": "Pixel AP",
    "pixel_F1Max": "Pixel F1-max",
    "pixel_AUPRO": "Pixel AUPRO",
    MEAN_OF_SEVEN: "Mean of seven",
}
#: What the page calls a decision, its style, and whether it is right.
_VERDICTS = {
    ("normal", True): ("False alarm", "alarm"),
    ("defect", False): ("Missed defect", "missed"),
    ("normal", False): ("Passed, normal", "right"),
    ("defect", True): ("Defect found", "right"),
    ("unlabelled", True): ("Called anomalous", "none"),
    ("unlabelled", False): ("Called normal", "none"),
    ("normal", None): ("Normal", "none"),
    ("defect", None): ("Defect", "none"),
    ("unlabelled", None): ("No label", "none"),
}


@dataclass
class _Cell:
    """A number of a table: how it is written, and what it is sorted by; ``None`` comes last."""

    text: str
    value: float | None


@dataclass
class _Card:
    """An image of the gallery."""

    number: int
    product: int
    example: Example
    verdict: str
    style: str
    type_number: int
    name: str
    image: str
    heat: str | None
    score: str


@dataclass
class _Product:
    """A product's part of the page."""

    number: int
    name: str
    record: ProductRecord
    threshold: str | None
    charts: list[Chart]
    notes: list[str]
    cells: list[_Cell] = field(default_factory=list)
    summary: str = ""
    cards: list[_Card] = field(default_factory=list)


def render(
    records: Mapping[str, ProductRecord],
    thresholds: Mapping[str, float | None],
    facts: Facts,
    metrics: Mapping[str, Mapping[str, float]],
    why_no_metrics: str,
    losses: Mapping[str, Sequence[tuple[int, float]]],
    max_images: int = 60,
    normalized: bool = True,
) -> str:
    """Write the page.

    Args:
        records (Mapping[str, ProductRecord]): What is kept of each product.
        thresholds (Mapping[str, float | None]): The threshold of each product.
        facts (Facts): What is said of the run.
        metrics (Mapping[str, Mapping[str, float]]): The seven metrics of each product and their mean, in [0, 1] or NaN;
            empty if there are none.
        why_no_metrics (str): Why there are none.
        losses (Mapping[str, Sequence[tuple[int, float]]]): Steps and values of each loss.
        max_images (int): Images of each product to show; less if there are very many products.
            Defaults to ``60``.
        normalized (bool): Whether anomaly maps are normalized to [0, 1]; others are scaled by their product's range.
            Defaults to ``True``.

    Returns:
        str: HTML that needs nothing else.
    """
    names = sorted(records)
    limit = max(1, min(max_images, _MOST_IMAGES // max(len(names), 1)))
    products = [_product(number, name, records[name], thresholds.get(name)) for number, name in enumerate(names)]
    chosen = {name: records[name].chosen(limit) for name in names}
    root = _common_folder([example.path for examples in chosen.values() for example in examples if example.path])
    types = sorted({example.defect_type for examples in chosen.values() for example in examples})
    numbers = {name: number for number, name in enumerate(types)}
    count = 0
    for product in products:
        low, high = (0.0, 1.0) if normalized else product.record.heat_range
        for example in chosen[product.name]:
            verdict, style = _VERDICTS[example.kind, example.flagged]
            heat = heatmap(example.picture, low, high)
            product.cards.append(
                _Card(
                    count, product.number, example, verdict, style, numbers[example.defect_type],
                    _relative(example.path, root), data_uri(example.picture.image),
                    None if heat is None else data_uri(heat), _number(example.score),
                )
            )  # fmt: skip
            count += 1
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = lambda number: f"{number:,}"
    template = environment.from_string(files("anomalib_decad.report").joinpath("template.html").read_text("utf-8"))
    return template.render(
        facts=facts,
        products=products,
        decided=any(product.record.counts["undecided"] < product.record.num_images for product in products),
        labelled=any(product.record.counts["normal"] + product.record.counts["defect"] for product in products),
        totals=_totals(products, metrics),
        types=types,
        num_shown=count,
        num_images=sum(record.num_images for record in records.values()),
        columns=[_TITLES[name] for name in (*METRICS, MEAN_OF_SEVEN)],
        rows=[_row(name, metrics[name], names) for name in metrics if name != MEAN],
        mean=[_percent(metrics[MEAN][key]) for key in (*METRICS, MEAN_OF_SEVEN)] if metrics else [],
        why_no_metrics=why_no_metrics,
        losses=[loss_chart(name, points) for name, points in losses.items() if points],
    )


def _product(number: int, name: str, record: ProductRecord, threshold: float | None) -> _Product:
    """Write what is said of a product."""
    charts = [histogram_chart(record, threshold), roc_chart(record), precision_recall_chart(record)]
    product = _Product(
        number, name, record, None if threshold is None else _number(threshold),
        [chart for chart in charts if chart], _notes(record, threshold),
    )  # fmt: skip
    counts = record.counts
    knows = not counts["undecided"]
    missed, alarms = counts["defect"] - counts["flagged defect"], counts["flagged normal"]
    product.cells = [
        _Cell(f"{counts['normal']:,}", counts["normal"]),
        _Cell(f"{counts['defect']:,}", counts["defect"]),
        _Cell(_MISSING, None) if threshold is None else _Cell(_number(threshold), threshold),
        _share(missed, counts["defect"]) if knows else _Cell(_MISSING, None),
        _share(alarms, counts["normal"]) if knows else _Cell(_MISSING, None),
    ]
    parts = [f"{record.num_images:,} images"]
    if knows and counts["defect"]:
        parts.append(f"{missed:,} of {counts['defect']:,} defects missed")
    if knows and counts["normal"]:
        parts.append(f"{alarms:,} false alarms in {counts['normal']:,} normal images")
    if counts["unlabelled"]:
        parts.append(f"{counts['unlabelled']:,} without labels")
    product.summary = ", ".join(parts)
    return product


def _notes(record: ProductRecord, threshold: float | None) -> list[str]:
    """Say what is missing, and why."""
    counts, notes = record.counts, []
    if counts["unlabelled"] == record.num_images:
        notes.append("The images have no labels, so nothing is right or wrong.")
    elif counts["unlabelled"]:
        notes.append(f"{counts['unlabelled']:,} images have no label.")
    elif not counts["normal"]:
        notes.append("There are only defects, so there are no curves and no false alarms.")
    elif not counts["defect"]:
        notes.append("There are only normal images, so there are no curves and no missed defects.")
    if threshold is None and counts["undecided"]:
        notes.append("There is no threshold, because the model was never validated: it calls nothing anomalous.")
    if counts["without mask"]:
        notes.append(f"{counts['without mask']:,} defects have no mask, so their contour is not drawn.")
    if counts["unscored"]:
        notes.append(f"{counts['unscored']:,} images have no finite score and are not shown.")
    return notes


def _totals(products: Sequence[_Product], metrics: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str, str]]:
    """Give the figures at the top of the page: what they are, the figure, and how it comes about."""
    records = [product.record for product in products]
    normal, defect = (sum(record.counts[kind] for record in records) for kind in ("normal", "defect"))
    images = sum(record.num_images for record in records)
    kinds = f"{normal:,} normal, {defect:,} defects" if normal + defect else "without labels"
    totals = [("Images tested", f"{images:,}", kinds)]
    decided = [record for record in records if not record.counts["undecided"]]
    if decided and defect:
        counted = sum(record.counts["defect"] for record in decided)
        missed = counted - sum(record.counts["flagged defect"] for record in decided)
        totals.append(("Missed defects", f"{missed:,}", f"of {counted:,} defects"))
    if decided and normal:
        counted = sum(record.counts["normal"] for record in decided)
        alarms = sum(record.counts["flagged normal"] for record in decided)
        totals.append(("False alarms", f"{alarms:,}", f"in {counted:,} normal images"))
    mean = metrics.get(MEAN, {})
    over = f"mean of {len(products)} products" if len(products) > 1 else "of one product"
    areas = [key for key in ("image_AUROC", "pixel_AUROC") if not math.isnan(mean.get(key, math.nan))]
    return totals + [(_TITLES[key], f"{100 * mean[key]:.1f} %", over) for key in areas]


def _row(name: str, row: Mapping[str, float], names: Sequence[str]) -> tuple[str, int | None, list[_Cell]]:
    """Give a row of the table of metrics, with the number of the product's part of the page."""
    return name, names.index(name) if name in names else None, [_percent(row[key]) for key in (*METRICS, MEAN_OF_SEVEN)]


def _number(value: float) -> str:
    """Write a score with four digits."""
    return f"{value:#.4g}".rstrip(".")


def _percent(value: float) -> _Cell:
    return _Cell(_MISSING, None) if math.isnan(value) else _Cell(f"{100 * value:.1f}", value)


def _share(part: int, whole: int) -> _Cell:
    return _Cell(f"{part:,} ({100 * part / whole:.1f} %)", part / whole) if whole else _Cell(_MISSING, None)


def _common_folder(paths: Sequence[str]) -> str:
    """Find what all paths begin with: what is above the data is nobody's business."""
    try:
        return os.path.commonpath([str(Path(path).parent) for path in paths])
    except ValueError:  # none, on several drives, or relative beside absolute ones
        return ""


def _relative(path: str, root: str) -> str:
    if not path:
        return "unnamed"
    return Path(path).relative_to(root).as_posix() if root and Path(path).is_relative_to(root) else Path(path).name
