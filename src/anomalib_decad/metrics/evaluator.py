# SPDX-License-Identifier: Apache-2.0
"""anomalib evaluator with the seven metrics for each category."""

import csv
import io
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from lightning.pytorch import Callback, LightningModule, Trainer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anomalib_decad.metrics.callback_order import put_before_post_processor, put_last
from anomalib_decad.metrics.category_metrics import MEAN, METRICS, CategoryMetrics
from anomalib_decad.metrics.decision_metrics import DECISIONS, DecisionMetrics
from anomalib_decad.metrics.raw_scores import lacks_threshold, score_of
from anomalib_decad.metrics.repeated_images import without_repeated
from anomalib_decad.whole_files import write_text

__all__ = ["CategoryEvaluator", "categories_of"]

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

    A test also measures what was decided: F1 score, recall, precision and false alarm rate of the labels and the F1
    score of the masks, at the thresholds in use.

    It works with every anomalib model: ``Patchcore(evaluator=CategoryEvaluator())``. The scores are taken before the
    post-processor, whose normalization clips them and so ties scores that differ; labels and masks behind it.

    Args:
        max_fpr (float): Largest false positive rate of AUPRO, in (0, 1].
            Defaults to ``0.3``.
        max_bins (int): Largest number of bins that the scores of a category are counted in. See
            :class:`anomalib_decad.metrics.ScoreHistogram`.
            Defaults to ``2**17``.

    Attributes:
        results (dict[str, dict[str, float]]): The metrics of the last test, in [0, 1] or NaN, for each category and for
            ``"mean"`` over the categories, with ``"mean_of_seven"`` in each. Empty before a test, and where the images
            have no labels.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, max_fpr: float = 0.3, max_bins: int = 2**17) -> None:
        super().__init__()
        self.metrics = CategoryMetrics(max_fpr, max_bins)
        self._decisions = _DecisionCounter()
        self.results: dict[str, dict[str, float]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Step in front of the post-processor."""
        super().setup(trainer, pl_module, stage)
        put_before_post_processor(trainer, self)
        put_last(trainer, self._decisions)

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
        self._add(trainer, without_repeated(trainer, batch, batch_idx, dataloader_idx))

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
        self.results = {}

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
        self._add(trainer, without_repeated(trainer, batch, batch_idx, dataloader_idx))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, print and write the metrics."""
        super().on_test_epoch_end(trainer, pl_module)
        self.metrics.synchronise()
        table = self.metrics.compute()
        if not table:
            logger.warning("The test images have no labels: there are no metrics.")
            return
        rows, means = self._log(trainer, pl_module, table)
        self._decisions.metrics.synchronise()
        decisions = self._decisions.metrics.compute()
        seven = self.metrics.mean_of_seven
        self.results = {c: {**row, MEAN_OF_SEVEN: seven(row)} for c, row in rows.items()} | {MEAN: means}
        if trainer.is_global_zero:
            self._report(rows, means, decisions, Path(trainer.default_root_dir))

    def _add(self, trainer: Trainer, batch: Any) -> None:
        """Add the predictions of a batch with labels."""
        if batch is None:
            return
        score = score_of(batch)
        if batch.gt_label is not None and score is not None:
            self.metrics.update(categories_of(trainer, batch), score, batch.gt_label, batch.anomaly_map, batch.gt_mask)

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

    def _report(
        self,
        rows: dict[str, dict[str, float]],
        means: dict[str, float],
        decisions: dict[str, dict[str, float]],
        folder: Path,
    ) -> None:
        """Write the tables to ``folder`` and print them."""
        folder.mkdir(parents=True, exist_ok=True)
        seven = {category: self.metrics.mean_of_seven(row) for category, row in rows.items()}
        lines = [(category, [*(row[name] for name in METRICS), seven[category]]) for category, row in rows.items()]
        lines.append((MEAN, [*(means[name] for name in METRICS), means[MEAN_OF_SEVEN]]))
        decided = {name: [row[key] for key in DECISIONS] for name, row in decisions.items()}

        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        missing = [math.nan] * len(DECISIONS)
        writer.writerow(["category", *METRICS, MEAN_OF_SEVEN, *DECISIONS])
        writer.writerows([name, *values, *decided.get(name, missing)] for name, values in lines)
        write_text(folder / "metrics.csv", text.getvalue())
        content = {
            "categories": {c: {**row, MEAN_OF_SEVEN: seven[c], **decisions.get(c, {})} for c, row in rows.items()},
            MEAN: {**means, **decisions.get(MEAN, {})},
        }
        write_text(folder / "metrics.json", json.dumps(_without_nan(content), indent=2) + "\n")

        # Last: an output that cannot show a name, or is closed, takes no results with it.
        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, _FILE_WIDTH)
        console.print(_table("Metrics in %", [*METRICS, MEAN_OF_SEVEN], lines))
        if decided:
            console.print(_table("Decisions in %, at the thresholds in use", DECISIONS, list(decided.items())))
        for note in self._notes(rows):
            console.print(note, markup=False)
        console.print(f"Written to {folder / 'metrics.csv'} and metrics.json", soft_wrap=True, markup=False)

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


class _DecisionCounter(Callback):
    """Counts what has been decided, behind the post-processor."""

    def __init__(self) -> None:
        self.metrics = DecisionMetrics()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the decisions of an earlier test."""
        del trainer, pl_module
        self.metrics.reset()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the decisions on a batch."""
        del outputs
        batch = without_repeated(trainer, batch, batch_idx, dataloader_idx)
        post_processor = getattr(pl_module, "post_processor", None)
        # Without thresholds, labels mean nothing.
        if batch is None or batch.gt_label is None or batch.pred_label is None or lacks_threshold(post_processor):
            return
        self.metrics.update(
            categories_of(trainer, batch), batch.pred_label, batch.gt_label, batch.pred_mask, batch.gt_mask
        )


def categories_of(trainer: Trainer, batch: Any) -> list[str]:
    """Name the category of each image: the batch knows it, or the datamodule has one.

    Args:
        trainer (Trainer): The trainer.
        batch (Any): A batch of images.

    Returns:
        list[str]: The names, ``"all"`` where nothing is known.
    """
    datamodule = getattr(trainer, "datamodule", None)
    only = getattr(datamodule, "category", None) or getattr(datamodule, "name", None) or "all"
    return getattr(batch, "category", None) or [only] * len(batch.image)


def _table(title: str, columns: Sequence[str], lines: Sequence[tuple[str, Sequence[float]]]) -> Table:
    """Make a table, one line for each category, of which the last is the mean."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("category", overflow="fold")  # a name that is too long goes on below
    for column in columns:
        table.add_column(column.replace("_", "\n"), justify="right", no_wrap=True)
    for index, (name, values) in enumerate(lines):
        table.add_row(Text(name), *map(_percent, values), end_section=index == len(lines) - 2)
    return table


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _without_nan(content: Any) -> Any:
    """Replace NaN, which is not JSON, by null."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    return None if isinstance(content, float) and math.isnan(content) else content
