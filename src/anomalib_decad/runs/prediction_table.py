# SPDX-License-Identifier: Apache-2.0
"""A line for each predicted image, in a file that other programs read."""

import csv
import math
from itertools import islice
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from anomalib_decad.data.transforms import sees_whole_images
from anomalib_decad.metrics import RawScores, gather, lacks_threshold, num_own_images, put_last
from anomalib_decad.whole_files import replacing

__all__ = ["COLUMNS", "PredictionTable"]

#: Columns of the file.
COLUMNS = (
    "path", "product", "score", "raw_score", "label", "defect_x", "defect_y", "defect_width", "defect_height",
    "defect_share",
)  # fmt: skip

#: The product of an image that is unlike every one that the model knows.
_UNLIKE = "unknown"


class PredictionTable(Callback):
    """Writes ``predictions.csv`` in a test and a prediction.

    A line has the path of the image, its product (the one that the data names, or that the model has recognized), the
    normalized score, the score as it was before, the label, and where the largest defect is: its left edge, upper edge,
    width and height in pixels of the image file, and the share of the image that all defects take. A model that was
    never validated has no threshold, and the label and what follows are empty. One that crops its images does not know
    where in the file a defect is, and all of that is empty. The file appears when it is complete.

    It works with every anomalib model: ``Engine(callbacks=[PredictionTable()])``.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None
        self._raw: RawScores | None = None
        #: Where the file is, after a run.
        self.path: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Step behind the post-processor."""
        del pl_module
        if stage in {"test", "predict"}:
            self._raw = RawScores.of(trainer)
            put_last(trainer, self)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the file."""
        del pl_module
        self._begin(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the file."""
        del pl_module
        self._begin(trainer)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the lines of a batch."""
        del outputs
        self._write(pl_module, batch, num_own_images(trainer, len(batch.image), batch_idx, dataloader_idx))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the lines of a batch."""
        del trainer, batch, batch_idx, dataloader_idx
        self._write(pl_module, outputs, len(outputs.image))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the file."""
        del pl_module
        self._complete(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the file."""
        del pl_module
        self._complete(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove what there is of the file."""
        del trainer, pl_module, exception
        if self._file is not None:
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = None

    def _begin(self, trainer: Trainer) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "predictions.csv"
        partial = folder / f"predictions.csv.{trainer.global_rank}.partial"
        self._file = partial.open("w", newline="", encoding="utf-8", errors="surrogateescape")

    def _write(self, pl_module: LightningModule, batch: Any, count: int) -> None:
        """Write the lines of the first ``count`` images of a batch."""
        length = len(batch.image)
        post_processor: Any = getattr(pl_module, "post_processor", None)
        products = getattr(batch, "category", None) or [None] * length
        if hasattr(post_processor, "categories_of") and post_processor.names_products_of(batch):
            products = [name or _UNLIKE for name in post_processor.categories_of(batch)]
        products = [name or "" for name in products]
        raw = self._raw.scores if self._raw else None
        paths = batch.image_path or [""] * length
        # Without a threshold anomalib compares with a number that means nothing.
        labels = None if lacks_threshold(post_processor) else batch.pred_label
        found = None if lacks_threshold(post_processor, "pixel") else batch.pred_mask
        columns = [_numbers(values, length) for values in (batch.pred_score, raw, labels)]
        for path, score in zip(paths, columns[0], strict=True):
            if score is not None and not math.isfinite(score):
                msg = f"the score of {path or 'an image'} is {score}: the weights of the model are damaged"
                raise ValueError(msg)
        masks = [None] * length if found is None or not sees_whole_images(pl_module) else found
        writer = csv.writer(self._file, lineterminator="\n")  # type: ignore[arg-type]
        rows = zip(paths, products, *columns, masks, strict=True)
        for path, product, score, plain, label, mask in islice(rows, count):
            verdict = "" if label is None else "anomalous" if label else "normal"
            writer.writerow([path, product, score, plain, verdict, *_find_defect(mask, path)])

    def _complete(self, trainer: Trainer) -> None:
        """Join the files of all processes."""
        if self._file is None or self.path is None:
            return
        self._file.close()
        parts = gather(self._file.name)
        self._file = None
        if trainer.is_global_zero:
            with (
                replacing(self.path) as whole,
                whole.open("w", newline="", encoding="utf-8", errors="surrogateescape") as target,
            ):
                writer = csv.writer(target, lineterminator="\n")
                writer.writerow(COLUMNS)
                for part in parts:
                    with Path(part).open(newline="", encoding="utf-8", errors="surrogateescape") as source:
                        writer.writerows(csv.reader(source))
            for part in parts:
                Path(part).unlink()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is of one run."""
        return {**vars(self), "_file": None, "_raw": None}


def _numbers(values: torch.Tensor | None, length: int) -> list[Any]:
    return [None] * length if values is None else values.reshape(length).tolist()


def _find_defect(mask: torch.Tensor | None, path: str) -> list[Any]:
    """Find left, top, width and height of the largest defect in the image file, and the share of all."""
    if mask is None:
        return [None] * 5
    found = mask.detach().reshape(mask.shape[-2:]).cpu().numpy().astype(np.uint8)
    share = float(found.mean())
    if not share:
        return [None, None, None, None, 0.0]
    _, _, boxes, _ = cv2.connectedComponentsWithStats(found, connectivity=8)
    left, top, width, height, _ = boxes[1 + boxes[1:, cv2.CC_STAT_AREA].argmax()]
    columns, rows = _size_of(path) or found.shape[::-1]
    across, down = columns / found.shape[1], rows / found.shape[0]
    edges = round(left * across), round(top * down), round((left + width) * across), round((top + height) * down)
    return [edges[0], edges[1], edges[2] - edges[0], edges[3] - edges[1], round(share, 6)]


def _size_of(path: str) -> tuple[int, int] | None:
    """Read width and height of an image file."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, Image.DecompressionBombError):
        return None
