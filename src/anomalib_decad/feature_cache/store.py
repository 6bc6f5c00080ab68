# SPDX-License-Identifier: Apache-2.0
"""Cached features on disk: a file for each key, which appears when it is complete and is never changed after."""

import errno
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from anomalib_decad.feature_cache.dataset import FeatureCode
from anomalib_decad.files import atomic_write

__all__ = ["load_or_build", "size_of"]

logger = logging.getLogger(__name__)

_GIB = 2**30


def size_of(shape: tuple[int, ...]) -> float:
    """Compute how many GiB float16 features of a shape take."""
    return 2 * math.prod(shape) / _GIB


def load_or_build(
    folder: Path, key: str, shape: tuple[int, ...], limit: float, build: Callable[[np.ndarray], FeatureCode]
) -> tuple[np.ndarray, FeatureCode]:
    """Map the file of a key into memory, and build it before if it is missing or damaged.

    One process builds at a time; others wait, and find the file. To make room, the least recently used files are
    deleted; a run that has mapped one keeps it.

    Args:
        folder (Path): Folder of the files.
        key (str): Changes with all that the features depend on.
        shape (tuple[int, ...]): Shape (images, layers, N, dim).
        limit (float): GiB that all files in the folder may take.
        build (Callable[[np.ndarray], FeatureCode]): Fills an array of the shape, and gives its code.

    Returns:
        tuple[np.ndarray, FeatureCode]: The features, float16, and their code.

    Raises:
        OSError: If the folder cannot be written to, or the disk has too little space.
    """
    path, size = folder / f"{key}.npy", size_of(shape)
    with _explaining(folder, size):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    with FileLock(folder / ".lock"):
        try:
            found = _load(path)
            logger.info("Feature cache: using %s (%.3g GiB).", path, size)
            path.touch()  # the most recently used
        except (OSError, ValueError, EOFError):
            logger.info("Feature cache: %.3g GiB on disk for %d images, in %s.", size, shape[0], path)
            path.unlink(missing_ok=True)
            _make_room(folder, limit - size)
            with atomic_write(path) as partial:
                _write(partial, shape, build)
            found = _load(path)
    return found


@contextmanager
def _explaining(folder: Path, size: float) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = (
            f"feature_cache: {size:.3g} GiB cannot be written to {folder} ({error.strerror}): give another folder "
            "(feature_cache_dir), or train with feature_cache=off"
        )
        raise OSError(msg) from error


def _load(path: Path) -> tuple[np.ndarray, FeatureCode]:
    features = np.load(path, mmap_mode="c")  # writable, on a copy: torch warns of arrays that are not
    with path.open("rb") as file:
        file.seek(features.offset + features.nbytes)
        return features, FeatureCode(*torch.from_numpy(np.load(file)))


def _write(path: Path, shape: tuple[int, ...], build: Callable[[np.ndarray], FeatureCode]) -> None:
    size = size_of(shape)
    with _explaining(path.parent, size):
        if size > shutil.disk_usage(path.parent).free / _GIB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        # The file is sparse until here. A page that the disk has no room for would end the process without a word.
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    code = build(features)
    features.flush()
    with path.open("ab") as file:  # after the features, where numpy does not look for more of them
        np.save(file, torch.stack([code.offset, code.scale]).cpu().numpy())


def _make_room(folder: Path, allowed: float) -> None:
    """Delete what killed runs have left, and the least recently used files beyond some GiB."""
    for path in folder.glob(".*.partial"):
        path.unlink()
    for path in sorted(folder.glob("*.npy"), key=lambda path: path.stat().st_mtime, reverse=True):
        allowed -= path.stat().st_size / _GIB
        if allowed < 0:
            logger.info("Deleting the feature cache %s to keep to feature_cache_limit.", path)
            path.unlink()
