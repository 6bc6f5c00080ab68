# SPDX-License-Identifier: Apache-2.0
"""Base of callbacks that read predictions, and what they ask of a model's pre-processor."""

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_decad.metrics import num_own_images

__all__ = ["PredictionCallback", "sees_whole_images", "steps_of"]


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
        """Read the batch before this one."""
        del args, kwargs
        self._read(trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch until it is complete."""
        del pl_module
        batch = outputs if hasattr(outputs, "image") else batch
        self._batch = batch, num_own_images(trainer, len(batch.image), batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the last batch."""
        self._read(trainer, pl_module)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Read the batch before this one."""
        del args, kwargs
        self._read(trainer, pl_module)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Keep a batch until it is complete."""
        del trainer, pl_module, args, kwargs
        self._batch = outputs, len(outputs.image)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the last batch."""
        self._read(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Forget the batch of a run that failed."""
        del trainer, pl_module, exception
        self._batch = None

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._batch is not None:
            (batch, count), self._batch = self._batch, None
            self.read_batch(trainer, pl_module, batch, count)


def steps_of(pl_module: LightningModule) -> list[Any]:
    """List the steps of a model's transform, and their parts; ``None`` where there is none."""
    todo, steps = [getattr(getattr(pl_module, "pre_processor", None), "transform", None)], []
    while todo:
        step = todo.pop()
        steps.append(step)
        todo += getattr(step, "transforms", [])
    return steps


def sees_whole_images(pl_module: LightningModule) -> bool:
    """Tell whether no step of a model's transform crops, so that places in its maps are places in the files."""
    return not any("Crop" in type(step).__name__ for step in steps_of(pl_module))
