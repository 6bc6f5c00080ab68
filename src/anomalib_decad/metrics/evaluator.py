# SPDX-License-Identifier: Apache-2.0
"""anomalib evaluator with the seven metrics for each category."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from lightning.pytorch import LightningModule, Trainer

from anomalib_decad.files import write_text_atomically
from anomalib_decad.metrics.category_metrics import MAD, MEAN, METRICS, CategoryMetrics
from anomalib_decad.metrics.decision_metrics import DECISIONS, DecisionMetrics
from anomalib_decad.metrics.predictions import categories_of, lacks_threshold, own_images, raw_maps_of, raw_scores_of

__all__ = ["CategoryEvaluator"]

logger = logging.getLogger(__name__)


class CategoryEvaluator(Evaluator):
    """Measures the seven metrics for each category when a model is validated or tested.

    Image AUROC, AP and F1-max, pixel AUROC, AP, F1-max and AUPRO are computed for each category and averaged over the
    categories. The means are logged as ``image_AUROC`` and so on, their mean as ``mAD``, and the metrics of a category
    as ``<category>/image_AUROC``, which ``ModelCheckpoint`` and ``EarlyStopping`` can monitor. After a test they are
    printed as a table and written to ``metrics.csv`` and ``metrics.json`` in the folder of the run.

    A test also measures what was decided: F1 score, recall, precision and false alarm rate of the labels and the F1
    score of the masks, at the thresholds in use.

    It works with every anomalib model: ``Patchcore(evaluator=CategoryEvaluator())``. anomalib's post-processor clips
    the scores, which ties scores that differ. The metrics are of raw scores for this package's models, and for others
    with ``post_processor=CategoryPostProcessor()``.

    Args:
        max_fpr (float): Largest false positive rate of AUPRO, in (0, 1].
        max_bins (int): Largest number of bins of a category's :class:`ScoreHistogram`.

    Attributes:
        results (dict[str, dict[str, float]]): The metrics of the last test, in [0, 1] or NaN, for each category and for
            ``"mean"`` over the categories, with ``"mAD"`` in each. Empty before a test, and where the images have no
            labels.
        decisions (dict[str, dict[str, float]]): In the same way what was decided; empty without thresholds.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, max_fpr: float = 0.3, max_bins: int = 2**17) -> None:
        super().__init__()
        self.metrics = CategoryMetrics(max_fpr, max_bins)
        self.decision_metrics = DecisionMetrics()
        self.results: dict[str, dict[str, float]] = {}
        self.decisions: dict[str, dict[str, float]] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the scores of an earlier evaluation."""
        del trainer, pl_module
        self.metrics.reset()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *args: Any, **kwargs: Any
    ) -> None:
        """Add the predictions of a batch."""
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, *args, **kwargs)
        self._add(trainer, own_images(trainer, batch, *args, **kwargs))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics."""
        super().on_validation_epoch_end(trainer, pl_module)
        self.metrics.synchronize()
        if table := self.metrics.compute():
            self._log(pl_module, table)
        # The training goes on, and the histograms of many categories are large.
        self.metrics.reset()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the scores of an earlier evaluation."""
        del trainer, pl_module
        self.metrics.reset()
        self.decision_metrics.reset()
        self.results, self.decisions = {}, {}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *args: Any, **kwargs: Any
    ) -> None:
        """Add the predictions of a batch, on which the post-processor, which comes first, has decided."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, *args, **kwargs)
        own = own_images(trainer, batch, *args, **kwargs)
        self._add(trainer, own)
        has_labels = own is not None and own.gt_label is not None and own.pred_label is not None
        if has_labels and not lacks_threshold(getattr(pl_module, "post_processor", None)):
            self.decision_metrics.update(
                categories_of(trainer, own), own.pred_label, own.gt_label, own.pred_mask, own.gt_mask
            )

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, write and print the metrics."""
        super().on_test_epoch_end(trainer, pl_module)
        self.metrics.synchronize()
        self.decision_metrics.synchronize()
        self.results, self.decisions = self.metrics.compute(), self.decision_metrics.compute()
        if not self.results:
            logger.warning("The test images have no labels: there are no metrics.")
            return
        self._log(pl_module, self.results)
        if trainer.is_global_zero:
            self._write(Path(trainer.default_root_dir))

    def _add(self, trainer: Trainer, batch: Any) -> None:
        """Add the predictions of a batch with labels."""
        score = None if batch is None else raw_scores_of(batch)
        if score is not None and batch.gt_label is not None:
            categories = categories_of(trainer, batch)
            self.metrics.update(categories, score, batch.gt_label, raw_maps_of(batch), batch.gt_mask)

    @staticmethod
    def _log(pl_module: LightningModule, table: Mapping[str, Mapping[str, float]]) -> None:
        """Log the means of a table, and the metrics of each category if there are several."""
        values = {**table[MEAN]}
        if len(table) > 2:
            values |= {f"{category}/{name}": value for category in table if category != MEAN
                       for name, value in table[category].items() if name != MAD}  # fmt: skip
        pl_module.log_dict({name: value for name, value in values.items() if not math.isnan(value)})

    def _write(self, folder: Path) -> None:
        """Write the tables to a folder and print them."""
        metrics = pd.DataFrame.from_dict(self.results, orient="index")[[*METRICS, MAD]]
        decisions = pd.DataFrame.from_dict(self.decisions, orient="index", columns=DECISIONS)
        table = metrics.join(decisions)
        write_text_atomically(folder / "metrics.csv", table.to_csv(index_label="category", lineterminator="\n"))
        rows = json.loads(table.to_json(orient="index", double_precision=15))
        content = {"categories": {name: row for name, row in rows.items() if name != MEAN}, MEAN: rows[MEAN]}
        write_text_atomically(folder / "metrics.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        # Last: an output that cannot show a name, or is closed, takes no results with it. In whole lines, as rich's
        # progress bar in a notebook never ends with one that is begun (docs/upstream.md, "A print of several lines").
        for title, part in (("Metrics in % (mAD is the mean of the seven)", metrics),
                            ("Decisions in %, at the thresholds in use", decisions)):  # fmt: skip
            if len(part):
                headings = pd.MultiIndex.from_tuples([column.partition("_")[::2] for column in part])
                text = (100 * part).set_axis(headings, axis=1).to_string(float_format="{:.1f}".format, na_rep="-")
                print(f"\n{title}\n{text}\n", end="")
        print(f"\nWritten to {folder / 'metrics.csv'} and metrics.json\n", end="")
