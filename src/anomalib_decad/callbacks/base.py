# SPDX-License-Identifier: Apache-2.0
"""Base of callbacks that read predictions."""

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_decad.metrics import num_own_images

__all__ = ["PredictionCallback", "sees_whole_images"]


class PredictionCallback(Callback):
    """Reads the batches of a test and a prediction after all other callbacks, in whatever order these are.

    anomalib's post-processor changes a batch in place, in the hook in which all callbacks get it. So a batch is kept
    until the next one starts, and read then. This package's models and its ``CategoryPostProcessor`` add the fields
    ``raw_score`` and ``raw_map`` to a batch: scores of shape (B,) and maps as the model gave them.
    """

    _batch: tuple[Any, int] | None = None

    @abstractmethod
    def read_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, count: int) -> None:
        """Read the predictions of a batch.

        Args:
            trainer (Trainer): The trainer.
            pl_module (LightningModule): The model.
            batch (Any): Batch with predictions, after the post-processor.
            count (int): Number of its images, the first ones, that no other process reads, too.
        """

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Read the batch before this one; at the end of an epoch the last one."""
        del args, kwargs
        if self._batch is not None:
            (batch, count), self._batch = self._batch, None
            self.read_batch(trainer, pl_module, batch, count)

    on_predict_batch_start = on_test_epoch_end = on_predict_epoch_end = on_test_batch_start

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Keep a batch until it is complete."""
        del pl_module
        batch = outputs if hasattr(outputs, "image") else batch
        self._batch = batch, num_own_images(trainer, len(batch.image), *args, **kwargs)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Keep a batch until it is complete."""
        del trainer, pl_module, args, kwargs
        self._batch = outputs, len(outputs.image)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Forget the batch of a run that failed."""
        del trainer, pl_module, exception
        self._batch = None


def sees_whole_images(pl_module: LightningModule) -> bool:
    """Tell whether a model's transform does not crop, so that places in its maps are places in the files."""
    return "Crop" not in repr(getattr(getattr(pl_module, "pre_processor", None), "transform", None))
