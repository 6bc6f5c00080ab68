# SPDX-License-Identifier: Apache-2.0
"""The last state of a training that does not end as it should."""

import atexit
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from anomalib_decad.runs.checkpoint_io import save_whole_checkpoints
from anomalib_decad.runs.final_validation import is_last_epoch, is_last_step
from anomalib_decad.runs.resume_command import is_command_line, resume_command

__all__ = ["LastState"]

logger = logging.getLogger(__name__)

# The exit status that shells give to what SIGTERM has ended.
_STATUS_OF_SIGTERM = 143


class LastState(Callback):
    """Saves the state of a training every few minutes, and when it is interrupted.

    It is in ``weights/last.ckpt`` of the run's folder. SIGINT (Ctrl-C) and SIGTERM end the training behind the step
    that is being done, of several processes behind the same one, and of several accumulated batches behind the last of
    them; a second SIGINT ends it at once. Behind the last step only the validation is left, which goes on. The last
    line says how to resume. A training that ends as it should has its own checkpoints, and this one is removed.

    Nothing is saved where the trainer saves no checkpoints.
    """

    #: Seconds between two saves.
    interval = 300.0

    def __init__(self) -> None:
        self._saved_at = 0.0
        self._saved_step = 0
        self._path: Path | None = None
        self._is_stopping = False
        self._is_in_step = False
        self._is_one_of_several = False
        self._handler: Callable[[int, FrameType | None], Any] | int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have checkpoints appear when they are complete."""
        del pl_module, stage
        save_whole_checkpoints(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to SIGINT."""
        del pl_module
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        self._path, self._is_stopping, self._is_in_step = None, False, False
        self._is_one_of_several = trainer.world_size > 1
        is_main = threading.current_thread() is threading.main_thread()
        # Another handler, as of a notebook or a cluster, knows better.
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        """Let a step end; what waits for data or validates can be broken off.

        One of several processes waits for the others at every step: all must end behind the same one.
        """
        if (self._is_in_step or self._is_one_of_several) and not self._is_stopping:
            self._is_stopping = True
            sys.stderr.write("\nInterrupted: the training ends behind this step. Once more to end it at once.\n")
        else:
            signal.default_int_handler(number, frame)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that the weights are about to change."""
        del trainer, pl_module, batch, batch_idx
        self._is_in_step = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the state when it is time, and end the training that has been interrupted.

        Raises:
            KeyboardInterrupt: If it was SIGINT.
            SIGTERMException: If it was SIGTERM.
        """
        del pl_module, outputs, batch
        # Within an accumulation, gradients would be lost.
        if not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        # Several processes: Lightning sees to SIGTERM.
        is_terminated = trainer.world_size == 1 and trainer.received_sigterm
        stops = self._is_stopping or is_terminated
        is_due = time.monotonic() - self._saved_at >= self.interval
        self._is_in_step = False
        if is_last_step(trainer):
            return
        if trainer.strategy.reduce_boolean_decision(stops or is_due, all=False):
            stops = trainer.strategy.reduce_boolean_decision(stops, all=False)
            self._save(trainer)
        if is_terminated:
            raise SIGTERMException
        if stops:
            raise KeyboardInterrupt

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Break a validation off, which may take longer than a system waits.

        Raises:
            SIGTERMException: If there was a SIGTERM.
        """
        del args, kwargs
        if trainer.state.fn == TrainerFn.FITTING and trainer.world_size == 1 and trainer.received_sigterm:
            raise SIGTERMException

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the state: the training has its own checkpoints."""
        del pl_module
        self._restore_handler()
        saved = any(getattr(callback, "best_model_path", "") for callback in trainer.checkpoint_callbacks)
        if self._path is not None and saved and trainer.is_global_zero:
            self._path.unlink(missing_ok=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the state if it is sound, and say how to go on."""
        self._restore_handler()
        if isinstance(exception, SIGTERMException):
            # Without it, also as Lightning raises it, the status is that of success.
            exception.code = _STATUS_OF_SIGTERM
        if trainer.state.fn != TrainerFn.FITTING:
            return
        # Other processes may be elsewhere and would not take part.
        if trainer.world_size == 1 and _is_sound(pl_module):
            if trainer.validating:
                # It goes on behind the validation, of which a part would give other thresholds.
                trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()
            self._save(trainer)
        if self._path is not None and trainer.is_global_zero:
            command = resume_command(self._path, self._limits_for_one_more(trainer))
            _say_last(f"The state of step {self._saved_step} is in {self._path}. Resume the training with: {command}")

    def _limits_for_one_more(self, trainer: Trainer) -> dict[str, int]:
        """Give the trainer's limits for one more step, where all have been done.

        Nothing is left to do for Lightning then, but the thresholds are missing: one step more has them found.
        """
        is_of_now = self._saved_step == trainer.global_step and not self._is_in_step
        if not (is_of_now and is_last_step(trainer)):
            return {}
        limits = {"max_steps": self._saved_step + 1}
        if trainer.max_epochs is not None and is_last_epoch(trainer):
            limits["max_epochs"] = trainer.max_epochs + 1
        return limits

    def _save(self, trainer: Trainer) -> None:
        """Save the state, unless it is there already."""
        self._saved_at = time.monotonic()
        if (
            trainer.global_step == self._saved_step
            or getattr(trainer, "fast_dev_run", False)
            or not trainer.checkpoint_callbacks
        ):
            return
        path = Path(trainer.default_root_dir) / "weights" / "last.ckpt"
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except OSError as error:
            # The training matters more.
            logger.warning("The state of the training is not saved: %s", error)
            return
        self._path, self._saved_step = path, trainer.global_step

    def _restore_handler(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the handler out, which is of this process."""
        return {**vars(self), "_handler": None}


def _is_sound(pl_module: LightningModule) -> bool:
    """Tell whether all weights that are trained are finite; others would be saved over good ones."""
    return all(bool(torch.isfinite(weight).all()) for weight in pl_module.parameters() if weight.requires_grad)


def _say_last(line: str) -> None:
    """Print a line; on the command line, behind the traceback."""
    if is_command_line():
        atexit.register(print, line, file=sys.stderr, flush=True)
    else:
        print(line)
