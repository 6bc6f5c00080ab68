# SPDX-License-Identifier: Apache-2.0
"""Charts of a product's scores, drawn by matplotlib and scikit-learn."""

import base64
import io
import math

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from sklearn.metrics import PrecisionRecallDisplay, RocCurveDisplay

from anomalib_decad.callbacks.report.record import KINDS, ProductRecord

__all__ = ["draw_charts"]

_STYLE = {"svg.fonttype": "none", "font.size": 9, "path.simplify_threshold": 1.0}
_COLORS = {"normal": "#0072b2", "defect": "#d55e00", "unlabelled": "#6b7280"}


def draw_charts(record: ProductRecord) -> str | None:
    """Draw scores and, of images of both kinds, ROC and precision over recall, and give an SVG file as a data URI.

    Without any score it is ``None``.
    """
    scores = {kind: np.array(record.scores[kind]) for kind in KINDS if len(record.scores[kind])}
    if not scores:
        return None
    has_both = "normal" in scores and "defect" in scores
    # In float32, as the scores: a threshold that differs by less would leave no room for bins.
    known = record.threshold is not None and math.isfinite(record.threshold)
    line = [np.float32(record.threshold)] if known else []
    edges = np.histogram_bin_edges(np.concatenate([*scores.values(), line]), bins=40)
    content = io.BytesIO()
    # matplotlib's own style, whatever the user's is, and without pyplot, which would keep the figure.
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(11 if has_both else 4, 2.8), layout="constrained")
        axes = figure.subplots(1, 3 if has_both else 1, squeeze=False)[0]
        for kind, values in scores.items():
            options = {"color": _COLORS[kind], "alpha": 0.6, "histtype": "stepfilled"}
            axes[0].hist(values, edges, weights=np.full(len(values), 1 / len(values)), label=kind, **options)
        for place in line:
            axes[0].axvline(float(place), color="black", linestyle="--", label=f"threshold {place:.4g}")
        axes[0].set(xlabel="score", ylabel="share of images")
        axes[0].yaxis.set_major_formatter(PercentFormatter(1))
        axes[0].legend()
        if has_both:
            labels = np.repeat([0, 1], [len(scores["normal"]), len(scores["defect"])])
            values = np.concatenate([scores["normal"], scores["defect"]])
            RocCurveDisplay.from_predictions(labels, values, name="ROC", ax=axes[1])
            options = {"name": "precision-recall", "drop_intermediate": True}
            PrecisionRecallDisplay.from_predictions(labels, values, ax=axes[2], **options)
            axes[1].set(xlabel="false alarm rate", ylabel="recall")
            axes[2].set(xlabel="recall", ylabel="precision")
        figure.savefig(content, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
