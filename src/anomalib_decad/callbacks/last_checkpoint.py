# SPDX-License-Identifier: Apache-2.0
"""Checkpoint of a training that does not end as it should."""

import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

__all__ = ["LastCheckpoint"]


class LastCheckpoint(ModelCheckpoint):
    """Saves ``weights/last.ckpt`` every few minutes, and when the training is interrupted (Ctrl-C, SIGTERM, an error).

    Ctrl-C ends the training after the current step, so that a resumed training goes on exactly where this one stopped;
    a second one ends it at once. A training that ends as it should has its own checkpoints, and this one is removed.

    Args:
        interval (timedelta): Time between two saves.
            Defaults to five minutes.
    """

    def __init__(self, interval: timedelta = timedelta(minutes=5)) -> None:
        super().__init__(
            filename="last", train_time_interval=interval, save_on_exception=True, enable_version_counter=False
        )
        self._is_in_step = self._is_interrupted = False
        self._handler: Callable[[int, FrameType | None], Any] | int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder."""
        self.dirpath = str(Path(trainer.default_root_dir) / "weights")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the end of a step on Ctrl-C, unless there is a handler already or several processes run."""
        super().on_train_start(trainer, pl_module)
        self._is_in_step = self._is_interrupted = False
        is_main = threading.current_thread() is threading.main_thread()
        if trainer.world_size == 1 and is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._is_in_step and not self._is_interrupted:
            self._is_interrupted = True
        else:
            signal.default_int_handler(number, frame)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Note that weights are about to change."""
        super().on_train_batch_start(*args, **kwargs)
        self._is_in_step = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time.

        Raises:
            KeyboardInterrupt: If Ctrl-C was pressed during the step.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return  # gradients that are being accumulated are in no checkpoint
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._is_in_step = False
        if self._is_interrupted:
            raise KeyboardInterrupt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, if the weights are finite and no other process would have to take part."""
        self._restore_handler()
        weights = (weight for weight in pl_module.parameters() if weight.requires_grad)
        if trainer.world_size > 1 or not all(bool(torch.isfinite(weight).all()) for weight in weights):
            return
        if trainer.validating:
            # Thresholds of half of a validation would differ: the resumed training validates from the start.
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()
        super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the checkpoint of a training that has its own."""
        super().on_train_end(trainer, pl_module)
        self._restore_handler()
        others = (callback for callback in trainer.checkpoint_callbacks if callback is not self)
        if trainer.is_global_zero and any(getattr(callback, "best_model_path", "") for callback in others):
            Path(str(self.dirpath), f"{self.filename}{self.FILE_EXTENSION}").unlink(missing_ok=True)

    def _restore_handler(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the handler, which belongs to this process."""
        return {**vars(self), "_handler": None}
