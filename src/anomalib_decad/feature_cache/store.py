# SPDX-License-Identifier: Apache-2.0
"""Cached features on disk."""

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from anomalib_decad.feature_cache.codec import FeatureCode

__all__ = ["GIB", "FeatureFile", "check_folder", "default_folder", "fingerprint", "num_bytes", "readable"]

logger = logging.getLogger(__name__)

_FEATURES, _CODE, _DONE = "features.npy", "code.npy", "done.json"
_USE = ".use"
GIB = 2**30


def default_folder() -> Path:
    """Name the folder of caches: ``anomalib_decad`` in the user's cache folder."""
    return user_cache_path("anomalib_decad", appauthor=False)


def num_bytes(shape: Sequence[int]) -> int:
    """Compute the size of float16 features of a shape."""
    return 2 * math.prod(shape)


def readable(size: float) -> str:
    """Write a number of bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def check_folder(folder: Path) -> None:
    """Check early that files can be written to a folder, which need not be there yet.

    Args:
        folder (Path): The folder.

    Raises:
        OSError: If they cannot.
    """
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "cannot be written to" if nearest.is_dir() else "is no folder"
        msg = f"feature_cache_dir: {nearest} {reason}: name another folder than {folder}"
        raise OSError(msg)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"feature_cache_dir: the folder {folder} cannot be made ({error.strerror}): name another one"
        raise OSError(msg) from error


def fingerprint(*parts: Any) -> str:
    """Compute a name that changes with any of its parts.

    Args:
        *parts (Any): Tensors, mappings of names to tensors, paths (which stand for the file's name, size and time of
            change), and anything else with a ``repr`` that tells its content.

    Returns:
        str: 32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for part in parts:
        _add(digest, part)
    return digest.hexdigest()[:32]


def _add(digest: Any, part: Any) -> None:
    if isinstance(part, torch.Tensor):
        digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
        digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(part, dict):
        for key, value in part.items():
            digest.update(f"{key}:".encode())
            _add(digest, value)
    elif isinstance(part, Path):
        status = part.stat()
        digest.update(f"{part.resolve()}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    else:
        digest.update(f"{part!r}|".encode())


class FeatureFile:
    """Features on disk: a folder that appears when it is complete and is never changed after.

    Args:
        folder (Path): Folder of all caches.
        key (str): Name of this one, a :func:`fingerprint` of all that the features depend on.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.path = folder / key
        self.partial = folder / f"{key}.partial"
        self.features = self.path / _FEATURES
        # The lock is released when the process ends, however it does. Its name is that of one run.
        self._use = FileLock(folder / f"{key}.{uuid.uuid4().hex}{_USE}")

    @property
    def is_complete(self) -> bool:
        """Whether there is something to read, and all of it."""
        try:
            mark = json.loads((self.path / _DONE).read_text())
            return mark["bytes"] == self.features.stat().st_size and (self.path / _CODE).is_file()
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing the same cache; they wait."""
        _make_folder(self.folder)
        with FileLock(f"{self.path}.lock"):
            yield

    def hold(self) -> None:
        """Keep other runs from deleting the cache to make room, until :meth:`release` or the end of the process."""
        with self._folder_lock():
            self._use.acquire()

    def release(self) -> None:
        """Allow other runs to delete the cache, unless some of them hold it."""
        if self._use.is_locked:
            self._use.release()
            Path(self._use.lock_file).unlink(missing_ok=True)

    def _folder_lock(self) -> FileLock:
        _make_folder(self.folder)
        return FileLock(self.folder / ".lock")

    def create(self, shape: tuple[int, ...], limit: float) -> None:
        """Begin to write: make room, and allocate a partial file.

        Args:
            shape (tuple[int, ...]): Shape (images, layers, N, dim).
            limit (float): GiB that all caches in the folder may take. The least recently used ones are deleted, but
                none that a run holds.

        Raises:
            OSError: If the disk has too little space.
        """
        self.discard()
        self._discard_dead()
        size = num_bytes(shape)
        self._make_room(limit * GIB - size)
        free = shutil.disk_usage(self.folder).free
        try:
            if size > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.partial.mkdir(parents=True)
            path = self.partial / _FEATURES
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape).flush()
            # The file is sparse until here. A page that the disk has no room for would end the process without a word.
            if hasattr(os, "posix_fallocate"):
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            self.discard()
            msg = (
                f"feature_cache: the features need {readable(size)}, but {self.folder} has only {readable(free)} left "
                f"or may not hold so much ({error.strerror}). Give another folder (feature_cache_dir) or train "
                "without (feature_cache=off)"
            )
            raise OSError(msg) from error

    def open_partial(self) -> np.ndarray:
        """Open the partial file for writing, also in several processes at once."""
        return np.lib.format.open_memmap(self.partial / _FEATURES, mode="r+")

    def write_code(self, code: FeatureCode) -> None:
        """Write the code of the features."""
        np.save(self.partial / _CODE, torch.stack([code.offset, code.scale]).cpu().numpy())

    def read_code(self) -> FeatureCode:
        """Read the code of the features, of the partial or the complete file."""
        folder = self.path if self.is_complete else self.partial
        offset, scale = torch.from_numpy(np.load(folder / _CODE)).unbind(0)
        return FeatureCode(offset, scale)

    def complete(self) -> None:
        """Let the file appear, in one step."""
        mark = {"format": 1, "bytes": (self.partial / _FEATURES).stat().st_size}
        (self.partial / _DONE).write_text(json.dumps(mark))
        shutil.rmtree(self.path, ignore_errors=True)
        self.partial.rename(self.path)

    def discard(self) -> None:
        """Delete the partial file, if any."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def touch(self) -> None:
        """Note the use, for the order in which old caches are deleted."""
        (self.path / _DONE).touch()

    def read(self) -> np.ndarray:
        """Read all features into memory."""
        return np.load(self.features)

    def _discard_dead(self) -> None:
        """Delete what killed runs have left: partial files that nobody holds the lock of."""
        for partial in self.folder.glob("*.partial"):
            lock = FileLock(f"{partial.with_suffix('')}.lock")
            try:
                with lock.acquire(timeout=0):
                    logger.info("Deleting %s, which a run that was cut short has left.", partial)
                    shutil.rmtree(partial, ignore_errors=True)
            except Timeout:
                continue

    def _make_room(self, allowed: float) -> None:
        """Delete the least recently used caches until the rest takes no more than some bytes."""
        with self._folder_lock():
            allowed -= sum(path.stat().st_size for path in self.folder.glob(f"*.partial/{_FEATURES}"))
            done = sorted(self.folder.glob(f"*/{_DONE}"), key=lambda path: path.stat().st_mtime, reverse=True)
            for path in done:
                features = path.parent / _FEATURES
                allowed -= features.stat().st_size if features.is_file() else 0
                if allowed < 0 and not self._is_held(path.parent):
                    logger.info("Deleting the feature cache %s to keep to feature_cache_limit.", path.parent)
                    # The mark first: what is left of a deletion that is cut short is no cache.
                    path.unlink()
                    shutil.rmtree(path.parent, ignore_errors=True)

    def _is_held(self, path: Path) -> bool:
        """Tell whether a run holds a cache, and forget runs that have ended."""
        for mark in self.folder.glob(f"{path.name}.*{_USE}"):
            if _is_locked(mark):
                return True
            mark.unlink()
        return False


def _is_locked(path: Path) -> bool:
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True
