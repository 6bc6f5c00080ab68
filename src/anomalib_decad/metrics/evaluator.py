# SPDX-License-Identifier: Apache-2.0
"""anomalib evaluator with the seven metrics for each category."""

import csv
import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from rich import box
from rich.console import Console
from rich.table import Table

from anomalib_decad.metrics.category_metrics import MEAN, METRICS, CategoryMetrics

__all__ = ["CategoryEvaluator"]

logger = logging.getLogger(__name__)

#: Key of the mean of the seven mean metrics.
MEAN_OF_SEVEN = "mean_of_seven"

#: Columns of a file, where names of any length have room.
_FILE_WIDTH = 400


class CategoryEvaluator(Evaluator):
    """Measures the seven metrics for each category when a model is validated or tested.

    Image AUROC, AP and F1-max, pixel AUROC, AP, F1-max and AUPRO are computed for each category and averaged over the
    categories. The means are logged as ``image_AUROC`` and so on, their mean as ``mean_of_seven``, and the metrics of a
    category as ``<category>/image_AUROC``, which ``ModelCheckpoint`` and ``EarlyStopping`` can monitor. After a test
    they are printed as a table and written to ``metrics.csv`` and ``metrics.json`` in the folder of the run.

    It works with every anomalib model: ``Patchcore(evaluator=CategoryEvaluator())``. The predictions are taken before
    the post-processor, whose normalization clips them and so ties scores that differ.

    Args:
        max_fpr (float): Largest false positive rate of AUPRO, in (0, 1].
            Defaults to ``0.3``.
        max_bins (int): Largest number of bins that the scores of a category are counted in. See
            :class:`anomalib_decad.metrics.ScoreHistogram`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, max_fpr: float = 0.3, max_bins: int = 2**17) -> None:
        super().__init__()
        if not 0 < max_fpr <= 1:
            msg = f"max_fpr must be in (0, 1], got {max_fpr}"
            raise ValueError(msg)
        self.metrics = CategoryMetrics(max_fpr, max_bins)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Step in front of the post-processor."""
        super().setup(trainer, pl_module, stage)
        callbacks = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        post = [index for index, callback in enumerate(callbacks) if isinstance(callback, PostProcessor)]
        # A new list: Lightning is iterating over the old one.
        trainer.callbacks = (  # type: ignore[attr-defined]
            [*callbacks[: post[0]], self, *callbacks[post[0] :]] if post else [*callbacks, self]
        )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the scores of an earlier evaluation."""
        del trainer, pl_module
        self.metrics.reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the predictions of a batch."""
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        self._add(trainer, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics."""
        super().on_validation_epoch_end(trainer, pl_module)
        self.metrics.synchronise()
        if table := self.metrics.compute():
            self._log(trainer, pl_module, table)
        # The training goes on, and the histograms of many categories are large.
        self.metrics.reset()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the scores of an earlier evaluation."""
        del trainer, pl_module
        self.metrics.reset()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the predictions of a batch."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        self._add(trainer, batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, print and write the metrics."""
        super().on_test_epoch_end(trainer, pl_module)
        self.metrics.synchronise()
        table = self.metrics.compute()
        if not table:
            logger.warning("The test images have no labels: there are no metrics.")
            return
        rows, means = self._log(trainer, pl_module, table)
        if trainer.is_global_zero:
            self._report(rows, means, Path(trainer.default_root_dir))

    def _add(self, trainer: Trainer, batch: Batch) -> None:
        """Add the predictions of a batch with labels."""
        if batch.gt_label is None:
            return
        categories = getattr(batch, "category", None) or [_category_of(trainer)] * len(batch.gt_label)
        score = batch.pred_score
        if score is None and batch.anomaly_map is not None:
            score = batch.anomaly_map.flatten(1).amax(1)
        if score is None:
            return
        self.metrics.update(categories, score, batch.gt_label, batch.anomaly_map, batch.gt_mask)

    def _log(
        self, trainer: Trainer, pl_module: LightningModule, table: dict[str, dict[str, float]]
    ) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """Log the metrics of a table, and give its rows and its means."""
        means = {**table[MEAN], MEAN_OF_SEVEN: self.metrics.mean_of_seven(table[MEAN])}
        rows = {category: row for category, row in table.items() if category != MEAN}
        logged = {name: value for name, value in means.items() if not math.isnan(value)}
        if len(rows) > 1:
            logged |= {f"{c}/{n}": v for c, row in rows.items() for n, v in row.items() if not math.isnan(v)}
        if trainer.barebones:
            tensors = {name: torch.tensor(value) for name, value in logged.items()}
            trainer.callback_metrics.update(tensors)
            trainer.logged_metrics.update(tensors)
        else:
            pl_module.log_dict(logged, rank_zero_only=False, sync_dist=False)
        return rows, means

    def _report(self, rows: dict[str, dict[str, float]], means: dict[str, float], folder: Path) -> None:
        """Print the table and write it to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        seven = {category: self.metrics.mean_of_seven(row) for category, row in rows.items()}
        lines = [(category, [*(row[name] for name in METRICS), seven[category]]) for category, row in rows.items()]
        lines.append((MEAN, [*(means[name] for name in METRICS), means[MEAN_OF_SEVEN]]))

        table = Table(title="Metrics in %", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
        for title in ("category", *METRICS, MEAN_OF_SEVEN):
            if title == "category":
                table.add_column(title, overflow="fold")  # a name that is too long goes on below
            else:
                table.add_column(title.replace("_", "\n"), justify="right", no_wrap=True)
        for name, values in lines:
            table.add_row(name, *map(_percent, values), end_section=name == lines[-2][0])
        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, _FILE_WIDTH)
        console.print(table)
        for note in self._notes(rows):
            console.print(note)

        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([["category", *METRICS, MEAN_OF_SEVEN], *([name, *values] for name, values in lines)])
        _write(folder / "metrics.csv", text.getvalue())
        content = {"categories": {c: {**row, MEAN_OF_SEVEN: seven[c]} for c, row in rows.items()}, MEAN: means}
        _write(folder / "metrics.json", json.dumps(_without_nan(content), indent=2) + "\n")
        console.print(f"Written to {folder / 'metrics.csv'} and metrics.json", soft_wrap=True)

    def _notes(self, rows: dict[str, dict[str, float]]) -> list[str]:
        """Say why metrics are missing."""
        notes = []
        for category, row in rows.items():
            if self.metrics.without_masks[category]:
                notes.append(f"{category}: images without masks, so the pixel metrics are left out")
            elif math.isnan(row["pixel_AUROC"]):
                notes.append(f"{category}: the masks have no defect, so the pixel metrics are left out")
            if math.isnan(row["image_AUROC"]):
                notes.append(f"{category}: not both normal and anomalous images, so the image metrics are left out")
        return notes


def _category_of(trainer: Trainer) -> str:
    """Name the category of a datamodule of one category."""
    datamodule = getattr(trainer, "datamodule", None)
    return getattr(datamodule, "category", None) or getattr(datamodule, "name", None) or "all"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _without_nan(content: Any) -> Any:
    """Replace NaN, which is not JSON, by null."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    return None if isinstance(content, float) and math.isnan(content) else content


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
