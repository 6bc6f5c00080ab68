# SPDX-License-Identifier: Apache-2.0
"""Writes a report of a test."""

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torchvision.transforms.v2 import Normalize

from anomalib_decad.data.transforms import sees_whole_images, steps_of
from anomalib_decad.metrics import (
    CategoryEvaluator,
    RawScores,
    categories_of,
    gather,
    num_own_images,
    put_last,
    threshold_of,
)
from anomalib_decad.ranges import check_range
from anomalib_decad.report.facts import collect_facts, seconds
from anomalib_decad.report.losses import LossCurves
from anomalib_decad.report.page import render
from anomalib_decad.report.pictures import Picture, draw
from anomalib_decad.report.record import Example, Kind, ProductRecord
from anomalib_decad.whole_files import write_text

__all__ = ["Report"]

logger = logging.getLogger(__name__)

#: A picture of the report may be this many times as wide as it is high, or the other way round.
_MOST_ASPECT = 4.0


class Report(Callback):
    """Writes ``report.html`` into the folder of the run after a test: one page that opens without server and network.

    It has the seven metrics, the scores, curves and decisions of each product, the images that are worth a look, with
    heatmaps and contours, the losses of a training before the test, and the configuration.

    It works with every anomalib model: ``Engine(callbacks=[Report()])``. The models of this package have one already
    (``report=False`` switches it off); one that is given takes its place.

    Args:
        max_images (int): Images of each product to show: the worst false alarms and missed defects, then those nearest
            to the threshold, of both kinds. With more than 50 products it is less.
            Defaults to ``60``.
        image_size (int): Longer side of an image in pixels.
            Defaults to ``224``.

    Raises:
        ValueError: If an argument is not positive.
    """

    def __init__(self, max_images: int = 60, image_size: int = 224) -> None:
        for name, value in (("max_images", max_images), ("image_size", image_size)):
            check_range(value > 0, name, "positive", value)
        self.max_images = max_images
        self.image_size = image_size
        self._losses = LossCurves()
        self._records: dict[str, ProductRecord] = {}
        self._raw = RawScores()
        self._began = 0.0
        self._fit_seconds: float | None = None
        self._steps = 0
        # What a checkpoint knows of the training that is to go on.
        self._resumed: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Step behind the post-processor, which gives labels and masks, and have the scores kept before it."""
        del pl_module
        # Lightning restores callbacks behind this, also for a test, whose checkpoint no training goes on from.
        self._resumed = {}
        if stage == "test":
            self._raw = RawScores.of(trainer)
            put_last(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier training, unless it is resumed."""
        del trainer, pl_module
        resumed = self._resumed
        self._losses, self._fit_seconds = LossCurves(), None
        self._began = time.monotonic() - resumed.get("seconds", 0.0)
        if resumed:
            self._losses.load_state_dict(resumed["losses"])

    def state_dict(self) -> dict[str, Any]:
        """Give a checkpoint the losses so far, and the seconds."""
        return {"losses": self._losses.state_dict(), "seconds": time.monotonic() - self._began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint has for the training that goes on from it."""
        self._resumed = state_dict

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the losses of a step."""
        del pl_module, outputs, batch, batch_idx
        is_last = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        if trainer.is_global_zero and self._losses.is_due(is_last):
            self._losses.add(trainer.global_step, trainer.callback_metrics)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how long the training has taken."""
        del pl_module
        self._fit_seconds, self._steps = time.monotonic() - self._began, trainer.global_step

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier test."""
        del trainer, pl_module
        self._records = {}
        self._began = time.monotonic()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the predictions of a batch, and keep the images that are worth a look."""
        del outputs
        if self._raw.scores is None:
            return
        scores = self._raw.scores.tolist()
        count = len(scores)
        own = num_own_images(trainer, count, batch_idx, dataloader_idx)
        post_processor = getattr(pl_module, "post_processor", None)
        categories = categories_of(trainer, batch)
        paths = [str(path or "") for path in getattr(batch, "image_path", None) or [""] * count]
        labels = _booleans(getattr(batch, "gt_label", None), count)
        flags = _booleans(getattr(batch, "pred_label", None), count)
        thresholds = {category: threshold_of(post_processor, category) for category in set(categories)}
        ranges = _ranges(getattr(batch, "anomaly_map", None), count)
        for index, category in enumerate(categories[:own]):
            record = self._records.setdefault(category, ProductRecord(self.max_images))
            label = labels[index]
            kind: Kind = "unlabelled" if label is None else "defect" if label else "normal"
            if kind == "defect" and getattr(batch, "gt_mask", None) is None:
                record.counts["without mask"] += 1
            record.widen(*ranges[index])
            flagged, threshold = flags[index], thresholds[category]
            if threshold is None and isinstance(post_processor, PostProcessor):
                # anomalib has compared with a number that means nothing.
                flagged = None
            elif threshold is not None and flagged is None and math.isfinite(scores[index]):
                flagged = scores[index] > threshold

            def make(index: int = index, kind: Kind = kind, flagged: bool | None = flagged) -> Example:
                path = paths[index]
                picture = self._draw(pl_module, batch, index, path, flagged is not None)
                return Example(path, Path(path).parent.name if path else "", kind, flagged, scores[index], picture)

            record.add(kind, flagged, scores[index], make)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report, and say where it is."""
        records, self._records = self._records, {}
        duration = time.monotonic() - self._began
        merged: dict[str, ProductRecord] = {}
        for theirs in gather(records):
            for category, record in theirs.items():
                if category in merged:
                    merged[category].merge(record)
                else:
                    merged[category] = record
        if not trainer.is_global_zero:
            return
        if not merged:
            logger.warning("The test has no images with scores: there is no report.")
            return
        post_processor = getattr(pl_module, "post_processor", None)
        facts = collect_facts(trainer, pl_module)
        if self._fit_seconds is not None:
            facts.run["training"] = f"{seconds(self._fit_seconds)}, {self._steps:,} steps"
        facts.run["test"] = f"{seconds(duration)}, {sum(record.num_images for record in merged.values()):,} images"
        metrics, why = _metrics_of(trainer)
        page = render(
            merged,
            {category: threshold_of(post_processor, category) for category in merged},
            facts,
            metrics,
            why,
            self._losses.points,
            self.max_images,
            normalized=_is_normalized(post_processor),
        )
        path = Path(trainer.default_root_dir) / "report.html"
        try:
            write_text(path, page)
        except OSError as error:
            # The test is done, and its metrics are there.
            logger.warning("The report is not written: %s", error)
            return
        print(f"Report: {path}")

    def _draw(self, pl_module: LightningModule, batch: Any, index: int, path: str, has_threshold: bool) -> Picture:
        """Draw an image of a batch."""
        image = _as_seen(pl_module, batch.image[index])
        # Of the batch, and not of the file: it has the geometry of the map and of the masks, and is there.
        anomaly_map, truth, found = (
            _pick(getattr(batch, name, None), index) for name in ("anomaly_map", "gt_mask", "pred_mask")
        )
        found = found if has_threshold else None
        return draw(image, anomaly_map, truth, found, self.image_size, _aspect_of(pl_module, path))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is of one run."""
        of_a_run = {"_records": {}, "_raw": RawScores(), "_losses": LossCurves(), "_fit_seconds": None, "_resumed": {}}
        return {**vars(self), **of_a_run}


def _metrics_of(trainer: Trainer) -> tuple[dict[str, dict[str, float]], str]:
    """Find the metrics of the test, or say why there are none."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, CategoryEvaluator)]  # type: ignore[attr-defined]
    if not found:
        return {}, (
            "The seven metrics are left out, because the model has another evaluator, or none. "
            "A model that is made with evaluator=CategoryEvaluator() has them."
        )
    return found[0].results, "The seven metrics are left out, because the test images have no labels."


def _is_normalized(post_processor: Any) -> bool:
    """Tell whether anomaly maps are between 0 and 1, and 0.5 is their threshold."""
    return (
        isinstance(post_processor, PostProcessor)
        and post_processor.enable_normalization
        and not bool(post_processor.pixel_min.isnan())
    )


def _booleans(values: torch.Tensor | None, count: int) -> list[bool | None]:
    """Read labels. anomalib gives scores as labels where it has no threshold."""
    if values is None or values.dtype not in (torch.bool, torch.uint8, torch.int32, torch.int64):
        return [None] * count
    return [bool(value) for value in values.reshape(-1).tolist()]


def _ranges(maps: torch.Tensor | None, count: int) -> list[tuple[float, float]]:
    """Find the smallest and the largest value of each anomaly map."""
    if maps is None:
        return [(float("inf"), float("-inf"))] * count
    low, high = maps.detach().reshape(count, -1).aminmax(dim=1)
    pairs = zip(low.tolist(), high.tolist(), strict=True)
    return [pair if pair[1] - pair[0] < float("inf") else (float("inf"), float("-inf")) for pair in pairs]


def _pick(values: torch.Tensor | None, index: int) -> torch.Tensor | None:
    return None if values is None else values[index]


def _as_seen(pl_module: LightningModule, image: torch.Tensor) -> torch.Tensor:
    """Undo the normalization of the colours, so that values are in [0, 1]."""
    image = image.detach().cpu().float()
    for step in steps_of(pl_module):
        if isinstance(step, Normalize) and len(step.mean) == len(image):
            mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (step.mean, step.std))
            return image * std + mean
    low, high = image.aminmax()
    if low < 0 or high > 1:
        # Of an unknown kind: at least everything can be seen.
        return (image - low) / (high - low).clamp(min=1e-12)
    return image


def _aspect_of(pl_module: LightningModule, path: str) -> float | None:
    """Find width over height of an image file, which the model may have seen as a square.

    ``None`` stands for an unknown one, and for that of an image of which only a part was seen.
    """
    if not path or not sees_whole_images(pl_module):
        return None
    with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError), Image.open(path) as file:
        return min(max(file.width / file.height, 1 / _MOST_ASPECT), _MOST_ASPECT)
    return None
