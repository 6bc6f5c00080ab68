# SPDX-License-Identifier: Apache-2.0
"""The images that are left of an epoch."""

import logging
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_decad.compat import training_iterator

__all__ = ["DataOrder"]

logger = logging.getLogger(__name__)

_KEY = "anomalib_decad_epoch"


class DataOrder(Callback):
    """Has a training that is resumed within an epoch go on with the images that are left of it.

    Lightning draws the order of the epoch's images anew. Here the random numbers of the epoch's beginning are in the
    checkpoint, with which the order is drawn again, and what has been seen is read once more and left out. Where an
    epoch has another number of batches now, nobody knows what has been seen, and the epoch begins anew.
    """

    def __init__(self) -> None:
        self._beginning: torch.Tensor | None = None
        self._first_epoch = 0
        self._num_seen = 0
        self._num_batches: int | None = None
        self._now: torch.Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the random numbers that the order of the first epoch is drawn with."""
        del trainer, pl_module
        if stage == "fit":
            self._beginning, self._num_seen = torch.get_rng_state(), 0

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add where the epoch is, if it is not at its end."""
        del pl_module
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        seen = progress.processed
        if self._beginning is not None and 0 < seen < trainer.num_training_batches:
            checkpoint[_KEY] = {
                "rng": self._beginning, "seen": seen, "batches": trainer.num_training_batches,
            }  # fmt: skip

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go back to the random numbers of the epoch's beginning, before the trainer draws the order."""
        del pl_module
        if trainer.state.fn != TrainerFn.FITTING:
            return
        # The model, which comes first, has put those of the checkpoint back.
        self._now = self._beginning = torch.get_rng_state()
        if epoch := checkpoint.get(_KEY):
            self._beginning, self._num_seen = epoch["rng"].cpu(), epoch["seen"]
            self._num_batches = epoch.get("batches")
            torch.set_rng_state(self._beginning)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out what has been seen."""
        del pl_module
        self._first_epoch = trainer.current_epoch
        if not self._num_seen or self._now is None:
            return
        if self._num_batches not in (None, trainer.num_training_batches):
            logger.warning(
                "The checkpoint is from within an epoch of %s batches, and an epoch has %s now: it begins anew.",
                self._num_batches, trainer.num_training_batches,
            )  # fmt: skip
            trainer.fit_loop.epoch_loop.batch_progress.current.reset()
            self._num_seen = 0
            return
        logger.info("Resuming within an epoch: reading the %d batches again that it has had.", self._num_seen)
        # It is not so.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
        iterator = training_iterator(trainer)
        for _ in range(self._num_seen):
            next(iterator)
        self._num_seen = 0
        torch.set_rng_state(self._now)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the random numbers that the order is drawn with; that of the first epoch has been drawn."""
        del pl_module
        if trainer.current_epoch > self._first_epoch:
            self._beginning = torch.get_rng_state()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is of one training."""
        return {**vars(self), "_beginning": None, "_now": None}
