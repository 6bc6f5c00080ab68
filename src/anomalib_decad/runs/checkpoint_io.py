# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there."""

import io
import os
from pathlib import Path
from typing import Any

import torch
from anomalib.engine.plugins import AnomalibCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from anomalib_decad.whole_files import replacing

__all__ = ["save_whole_checkpoints"]


class _WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place, and moves it there when it is complete.

    Lightning writes it to the folder for temporary files first. From another disk it is then copied, and where the
    target's disk is full, or the power fails, a part of it is left in the place of an earlier one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.
            path (str | Path): Its file.
            storage_options (Any): Of a remote file system.

        Raises:
            OSError: If it cannot be written; what was there before is still there.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as partial, partial.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            size = content.getbuffer().nbytes / 2**20
            msg = (
                f"the checkpoint {target} of {size:.0f} MiB cannot be written ({error.strerror or error}): make room, "
                "or give another --default_root_dir"
            )
            raise type(error)(error.errno, msg) from error


class _WholeAnomalibCheckpoints(_WholeCheckpoints, AnomalibCheckpointIO):
    """The same with what anomalib allows a checkpoint to hold."""


def save_whole_checkpoints(trainer: Trainer) -> None:
    """Have a trainer's checkpoints appear when they are complete.

    Args:
        trainer (Trainer): The trainer, in ``setup``. A checkpoint plug-in of the user stays.
    """
    current = trainer.strategy.checkpoint_io
    if type(current) is AnomalibCheckpointIO:
        trainer.strategy.checkpoint_io = _WholeAnomalibCheckpoints(current.extra_safe_globals)
    elif type(current) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = _WholeCheckpoints()
