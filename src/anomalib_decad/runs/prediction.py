# SPDX-License-Identifier: Apache-2.0
"""What a prediction leaves out, and what it has found."""

import logging
from pathlib import Path
from typing import Any

from anomalib.data import PredictDataset
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_decad.compat import predict_datasets
from anomalib_decad.data import find_unreadable
from anomalib_decad.metrics import gather, lacks_threshold
from anomalib_decad.progress import showing_progress

__all__ = ["PredictionSummary"]

logger = logging.getLogger(__name__)

# Names of files in the line; each has a warning of its own with the reason.
_MOST_NAMES = 20

# So many files take seconds to look at.
_MANY = 200


class PredictionSummary(Callback):
    """Skips the files of a folder that cannot be read, and says in the last lines what a prediction has found."""

    def __init__(self) -> None:
        self._unreadable: dict[str, str] = {}
        self._counts = (0, 0, 0)
        self._has_labels = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave files out that are no images, or only the first part of one.

        Args:
            trainer (Trainer): The trainer.
            pl_module (LightningModule): The model.
            stage (str): Only ``"predict"`` matters.

        Raises:
            OSError: If no file can be read.
        """
        del pl_module
        if stage != "predict":
            return
        self._unreadable, self._counts, self._has_labels = {}, (0, 0, 0), True
        for dataset in predict_datasets(trainer):
            if not isinstance(dataset, PredictDataset):
                continue
            takes_long = len(dataset.image_filenames) >= _MANY
            with showing_progress("Checking the images", takes_long and trainer.is_global_zero) as report:
                unreadable = find_unreadable(dataset.image_filenames, report)
            self._unreadable |= unreadable
            for path, reason in unreadable.items():
                logger.warning("%s cannot be read and is skipped: %s", path, reason)
            kept = [path for path in dataset.image_filenames if str(path) not in unreadable]
            if unreadable and not kept:
                path, reason = next(iter(unreadable.items()))
                msg = f"none of the {len(unreadable)} files can be read, for example {path}: {reason}"
                raise OSError(msg)
            dataset.image_filenames = kept

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the images of a batch, those that are anomalous, and those that are unlike every product."""
        del trainer, batch, batch_idx, dataloader_idx
        labels = getattr(outputs, "pred_label", None)
        self._has_labels &= labels is not None
        post_processor: Any = getattr(pl_module, "post_processor", None)
        names = getattr(post_processor, "names_products_of", lambda _: False)(outputs)
        products = post_processor.categories_of(outputs) if names else []
        found = len(outputs.image), int(labels.sum()) if labels is not None else 0, products.count(None)
        images, anomalous, unlike = (old + new for old, new in zip(self._counts, found, strict=True))
        self._counts = images, anomalous, unlike

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the images of all processes up."""
        del trainer, pl_module
        gathered = gather((self._counts, self._has_labels))
        images, anomalous, unlike = (sum(counts) for counts in zip(*(counts for counts, _ in gathered), strict=True))
        self._counts = images, anomalous, unlike
        self._has_labels = all(has_labels for _, has_labels in gathered)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what was skipped, and in the last line what was found and where the pictures are."""
        if stage != "predict" or not trainer.is_global_zero:
            return
        folder = _pictures_of(trainer, pl_module)
        if self._unreadable:
            names = list(self._unreadable)
            more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            print(f"Skipped {len(names)} files that cannot be read: {', '.join(names[:_MOST_NAMES])}{more}")
        images, anomalous, unlike = self._counts
        knows = self._has_labels and not lacks_threshold(getattr(pl_module, "post_processor", None))
        found = f"{anomalous} of them anomalous" if knows else "without labels, as the model has no thresholds"
        if unlike:
            found += f", {unlike} unlike every product that the model knows"
        pictures = f"the pictures are in {folder}" if folder else "no pictures, as the model has no visualizer"
        table = Path(trainer.default_root_dir) / "predictions.csv"
        print(f"Predicted {images} images, {found}; a line for each is in {table}; {pictures}")


def _pictures_of(trainer: Trainer, pl_module: LightningModule) -> Path | None:
    """Find the folder of the pictures."""
    visualizer = getattr(pl_module, "visualizer", None)
    if not isinstance(visualizer, ImageVisualizer):
        return None
    return Path(visualizer.output_dir or Path(trainer.default_root_dir) / "images")
