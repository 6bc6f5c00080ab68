# SPDX-License-Identifier: Apache-2.0
"""A validation behind the last step."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["FinalValidation", "is_last_epoch", "is_last_step"]


class FinalValidation(Callback):
    """Has Lightning validate behind the last step of a fit, where its own schedule does not.

    A training that is shorter than an epoch, or than ``val_check_interval``, would end without thresholds, and one that
    goes on after its last validation would end with those of other weights. Without validation images, or with
    ``limit_val_batches=0``, nothing changes.
    """

    def __init__(self) -> None:
        self._schedule: tuple[int | None] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the trainer at the last step, which validates when it is stopped."""
        del pl_module, outputs, batch, batch_idx
        if is_last_step(trainer):
            trainer.should_stop = True
        if trainer.should_stop and trainer.check_val_every_n_epoch not in (None, 1):
            # In an epoch without validation a trainer that is stopped has none.
            self._schedule = (trainer.check_val_every_n_epoch,)
            trainer.check_val_every_n_epoch = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the schedule of the validations back."""
        del pl_module
        self._restore(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the schedule of the validations back."""
        del pl_module, exception
        self._restore(trainer)

    def _restore(self, trainer: Trainer) -> None:
        if self._schedule is not None:
            (trainer.check_val_every_n_epoch,) = self._schedule
            self._schedule = None


def is_last_step(trainer: Trainer) -> bool:
    """Tell whether the step that has just been done is the last one."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    return trainer.is_last_batch and is_last_epoch(trainer)


def is_last_epoch(trainer: Trainer) -> bool:
    """Tell whether the epoch that is being done is the last one that the trainer allows."""
    return trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
