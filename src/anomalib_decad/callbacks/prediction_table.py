# SPDX-License-Identifier: Apache-2.0
"""A row for each predicted image, in a file that other programs read."""

import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningModule, Trainer

from anomalib_decad.callbacks.base import PredictionCallback, sees_whole_images
from anomalib_decad.data import image_size
from anomalib_decad.files import atomic_write
from anomalib_decad.metrics import gather, lacks_threshold, raw_scores_of

__all__ = ["COLUMNS", "PredictionTable"]

logger = logging.getLogger(__name__)

#: Columns of the file.
COLUMNS = (
    "path", "product", "score", "raw_score", "label", "defect_x", "defect_y", "defect_width", "defect_height",
    "defect_share",
)  # fmt: skip

#: The product of an image that is unlike every one that the model knows.
_UNKNOWN = "unknown"


class PredictionTable(PredictionCallback):
    """Writes ``predictions.csv`` in a test and a prediction.

    A row has the path of the image, its product (that of the data, or the one that the model has recognized), the
    normalized score, the raw score, the label, and where the largest defect is: its left edge, upper edge, width and
    height in pixels of the image file, and the share of the image that all defects take. A model that was never
    validated has no threshold, and the label and what follows are empty. A model that crops its images does not know
    where in the file a defect is, and all of that is empty. The file appears when the run is complete.

    It works with every anomalib model: ``Engine(callbacks=[PredictionTable()])``.
    """

    def __init__(self) -> None:
        self._rows: list[list[Any]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run."""
        del trainer, pl_module
        self._rows = []

    on_predict_start = on_test_start

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows of all processes."""
        rows = [row for theirs in gather(self._rows) for row in theirs]
        self._rows = []
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "predictions.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pd.DataFrame(rows, columns=COLUMNS, dtype=object)
        with atomic_write(path) as partial:
            table.to_csv(partial, index=False, errors="surrogateescape", lineterminator="\n")
        if trainer.predicting:
            counts = Counter(table["label"])
            has_labels = not lacks_threshold(getattr(pl_module, "post_processor", None))
            found = f"{counts['anomalous']} anomalous" if has_labels else "no labels, as the model has no thresholds"
            num_unknown = int((table["product"] == _UNKNOWN).sum())
            unknown = f", {num_unknown} unlike every product" if num_unknown else ""
            logger.info("Predicted %d images (%s%s): %s", len(table), found, unknown, path)

    on_predict_end = on_test_end

    def read_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, count: int) -> None:
        """Take the rows of a batch.

        Raises:
            ValueError: If a score is not finite.
        """
        del trainer
        length = len(batch.image)
        post_processor: Any = getattr(pl_module, "post_processor", None)
        products = getattr(batch, "category", None) or [None] * length
        if hasattr(post_processor, "categories_of") and (names := post_processor.categories_of(batch)):
            products = [name or _UNKNOWN for name in names]
        paths = batch.image_path or [""] * length
        # Without a threshold anomalib compares with a number that means nothing.
        labels = None if lacks_threshold(post_processor) else batch.pred_label
        masks = None if lacks_threshold(post_processor, "pixel") else batch.pred_mask
        columns = [_to_list(values, length) for values in (batch.pred_score, raw_scores_of(batch), labels)]
        if masks is None or not sees_whole_images(pl_module):
            masks = [None] * length
        rows = zip(paths, products, *columns, masks, strict=True)
        for path, product, score, raw_score, label, mask in list(rows)[:count]:
            if score is not None and not math.isfinite(score):
                msg = f"the score of {path or 'an image'} is {score}: the weights of the model are damaged"
                raise ValueError(msg)
            verdict = None if label is None else "anomalous" if label else "normal"
            self._rows.append([path, product, score, raw_score, verdict, *_find_defect(mask, path)])


def _to_list(values: torch.Tensor | None, length: int) -> list[Any]:
    return [None] * length if values is None else values.reshape(length).tolist()


def _find_defect(mask: torch.Tensor | None, path: str) -> list[Any]:
    """Find left, top, width and height of the largest defect in pixels of the image file, and the share of all."""
    if mask is None:
        return [None] * 5
    found = mask.detach().reshape(mask.shape[-2:]).cpu().numpy().astype(np.uint8)
    share = float(found.mean())
    if not share:
        return [None, None, None, None, 0.0]
    _, _, boxes, _ = cv2.connectedComponentsWithStats(found, connectivity=8)
    left, top, width, height, _ = boxes[1 + boxes[1:, cv2.CC_STAT_AREA].argmax()]
    try:
        columns, rows = image_size(path)
    except OSError:  # the file is gone
        rows, columns = found.shape
    across, down = columns / found.shape[1], rows / found.shape[0]
    edges = round(left * across), round(top * down), round((left + width) * across), round((top + height) * down)
    return [edges[0], edges[1], edges[2] - edges[0], edges[3] - edges[1], round(share, 6)]
