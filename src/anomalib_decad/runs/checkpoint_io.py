# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there, and that are read or refused in a line."""

import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from anomalib.engine.plugins import AnomalibCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from anomalib_decad.whole_files import replacing

__all__ = ["reading", "save_whole_checkpoints"]


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Name a checkpoint, and what to do, in whatever its reading raises.

    Args:
        path (str | Path): Its file.

    Yields:
        None: While it is read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, only a part of one, or not the wanted one.
    """
    if not Path(path).is_file():
        msg = f"there is no checkpoint {path}: give the path of one (--ckpt_path)"
        raise FileNotFoundError(msg)
    try:
        yield
    except PermissionError as error:
        msg = f"{path} cannot be read: {error.strerror}"
        raise PermissionError(error.errno, msg) from error
    except (EOFError, KeyError, OSError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        msg = f"{path} is no checkpoint of this package, or only a part of one: give another, or copy it again"
        raise ValueError(msg) from error
    except ValueError as error:
        msg = f"{path}: {error}"
        raise ValueError(msg) from error


class _Readable(TorchCheckpointIO):
    """Refuses what is no checkpoint in one line."""

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint.

        Args:
            path (str | Path): Its file.
            *args (Any): Arguments of Lightning's method.
            **kwargs (Any): Arguments of Lightning's method.

        Returns:
            dict[str, Any]: The checkpoint.

        Raises:
            ValueError: If it is none.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, *args, **kwargs)
        with reading(path):
            content = super().load_checkpoint(path, *args, **kwargs)
            if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
                msg = "something else has been saved there"
                raise RuntimeError(msg)
            return content


class _WholeCheckpoints(_Readable):
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
