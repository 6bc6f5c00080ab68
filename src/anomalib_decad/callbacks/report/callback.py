# SPDX-License-Identifier: Apache-2.0
"""Writes a report of a test."""

import logging
import os
import platform
import textwrap
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from anomalib.data.utils import ValSplitMode
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer

from anomalib_decad.callbacks.base import PredictionCallback
from anomalib_decad.callbacks.report.page import render
from anomalib_decad.callbacks.report.pictures import draw
from anomalib_decad.callbacks.report.record import Example, Kind, ProductRecord
from anomalib_decad.files import write_text_atomically
from anomalib_decad.metrics import CategoryEvaluator, categories_of, gather, lacks_threshold, raw_scores_of
from anomalib_decad.ranges import check_range

__all__ = ["Report"]

logger = logging.getLogger(__name__)


class Report(PredictionCallback):
    """Writes ``report.html`` into the folder of the run after a test: one page that opens without server and network.

    It shows the seven metrics, scores, curves and decisions of each product, the images that are worth a look with
    heatmaps and contours, and the configuration.

    It works with every anomalib model: ``Engine(callbacks=[Report()])``. The models of this package have one already
    (``report=False`` switches it off); one that is given takes its place.

    Args:
        max_images (int): Images of each product to show: the worst false alarms and missed defects, then those nearest
            to the threshold, of both kinds. With more than 50 products it is less. Defaults to ``60``.
        image_size (int): Longer side of an image in pixels. Defaults to ``224``.

    Raises:
        ValueError: If an argument is not positive.
    """

    def __init__(self, max_images: int = 60, image_size: int = 224) -> None:
        check_range(max_images > 0, "max_images", "positive", max_images)
        check_range(image_size > 0, "image_size", "positive", image_size)
        self.max_images, self.image_size = max_images, image_size
        self._records: dict[str, ProductRecord] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier test."""
        del trainer, pl_module
        self._records = {}

    def read_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, count: int) -> None:
        """Count the predictions of a test's batch, and keep the images that are worth a look."""
        post_processor: Any = getattr(pl_module, "post_processor", None)
        is_raw = hasattr(post_processor, "raw_threshold") or not _is_normalized(post_processor, "image")
        scores = raw_scores_of(batch) if is_raw else batch.pred_score
        if scores is None or not trainer.testing:
            return
        paths = getattr(batch, "image_path", None) or [""] * len(batch.image)
        truth, found = _booleans(batch, "gt_label"), _booleans(batch, "pred_label")
        rows = zip(categories_of(trainer, batch), scores.reshape(-1).tolist(), strict=True)
        for index, (category, score) in enumerate(list(rows)[:count]):
            if category not in self._records:
                threshold = _threshold_of(post_processor, category)
                self._records[category] = ProductRecord(self.max_images, threshold, is_raw)
            record = self._records[category]
            kind: Kind = "unlabelled" if truth[index] is None else "defect" if truth[index] else "normal"
            record.counts["without mask"] += kind == "defect" and getattr(batch, "gt_mask", None) is None
            # Without a threshold anomalib's label is a comparison with NaN.
            is_decided = record.threshold is not None or not isinstance(post_processor, PostProcessor)
            example = Example(str(paths[index] or ""), kind, found[index] if is_decided else None, score)
            if record.add(example):
                example.picture = draw(pl_module, batch, index, self.image_size, example.flagged is not None)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report, and say where it is. An error is a warning, as the test has its results."""
        gathered, self._records = gather(self._records), {}
        records: dict[str, ProductRecord] = {}
        for category, record in (item for theirs in gathered for item in theirs.items()):
            records.setdefault(category, ProductRecord(self.max_images, record.threshold, record.is_raw)).merge(record)
        if not trainer.is_global_zero:
            return
        if not records:
            logger.warning("The test has no images with scores: there is no report.")
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        evaluator = next((callback for callback in callbacks if isinstance(callback, CategoryEvaluator)), None)
        datamodule, path = getattr(trainer, "datamodule", None), Path(trainer.default_root_dir) / "report.html"
        datamodules = datamodule, *getattr(datamodule, "datamodules", {}).values()
        try:
            page = render(
                records,
                _facts(trainer, pl_module),
                getattr(evaluator, "results", None),
                getattr(evaluator, "decisions", {}),
                self.max_images,
                _is_normalized(getattr(pl_module, "post_processor", None), "pixel"),
                any(getattr(one, "val_split_mode", None) == ValSplitMode.SAME_AS_TEST for one in datamodules),
            )
            write_text_atomically(path, page)
        except Exception as error:
            logger.warning("The report is not written: %s", error, exc_info=not isinstance(error, OSError))
            return
        print(f"Report: {path}")


def _facts(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Collect what the page says of the run."""
    device = trainer.strategy.root_device
    names = [getattr(getattr(trainer, "datamodule", None), name, None) for name in ("name", "category")]
    checkpoint = trainer.ckpt_path or getattr(trainer.checkpoint_callback, "best_model_path", None)
    if checkpoint and Path(checkpoint).is_relative_to(trainer.default_root_dir):
        checkpoint = Path(checkpoint).relative_to(trainer.default_root_dir)
    run = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} {platform.machine()}",
        "precision": trainer.precision, "processes": trainer.world_size, "python": platform.python_version(),
        **{name: version(name) for name in ("anomalib-decad", "anomalib", "torch", "lightning")},
    }  # fmt: skip
    images = getattr(pl_module, "training_images", None)
    odd = {}
    if images is not None:
        root = Path(os.path.commonpath([Path(path).parent for path in images.image_path]))
        odd = {str(Path(row.image_path).relative_to(root)): f"{row.score:.3g}" for row in images[:20].itertuples()}
    arguments = pd.json_normalize(dict(pl_module.hparams), sep=".").to_dict("records")[0]
    return {
        "model": getattr(pl_module, "name", type(pl_module).__name__),
        "data": " / ".join(dict.fromkeys(str(name) for name in names if name)) or "unnamed data",
        "date": datetime.now().astimezone(), "checkpoint": checkpoint, "tables": {
            "Run": run,
            "Training images that are least like others, and their abnormal energies": odd,
            "Configuration of the model": {key: textwrap.shorten(str(arguments[key]), 300) for key in arguments},
        },
    }  # fmt: skip


def _is_normalized(post_processor: Any, kind: Literal["image", "pixel"]) -> bool:
    """Tell whether scores or maps are between 0 and 1 after a post-processor, with the threshold at 0.5."""
    normalizes = isinstance(post_processor, PostProcessor) and post_processor.enable_normalization
    return normalizes and not bool(getattr(post_processor, f"{kind}_min").isnan())


def _threshold_of(post_processor: Any, category: str) -> float | None:
    """Give the threshold that labels follow, in raw scores if each product has its own, else as anomalib has it."""
    if not isinstance(post_processor, PostProcessor) or not post_processor.enable_thresholding:
        return None
    if (raw_threshold := getattr(post_processor, "raw_threshold", None)) is not None:
        return raw_threshold("image", category)
    return None if lacks_threshold(post_processor) else 1 - post_processor.image_sensitivity


def _booleans(batch: Any, name: str) -> list[bool | None]:
    """Read labels. anomalib gives scores as labels where it has no threshold."""
    values = getattr(batch, name, None)
    if values is None or values.is_floating_point():
        return [None] * len(batch.image)
    return values.reshape(-1).bool().tolist()
