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
from typing import Any

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


Build = Callable[[Callable[[memoryview], Any]], FeatureCode]


def load_or_build(
    folder: Path, key: str, shape: tuple[int, ...], limit: float, build: Build
) -> tuple[np.ndarray, FeatureCode]:
    """Map the file of a key into memory, and build it before if it is missing or damaged.

    One process builds at a time; others wait, and find the file. To make room, the least recently used files are
    deleted; a run that has mapped one keeps it.

    Args:
        folder (Path): Folder of the files.
        key (str): Changes with all that the features depend on.
        shape (tuple[int, ...]): Shape (images, layers, N, dim).
        limit (float): GiB that all files in the folder may take.
        build (Callable): Takes a function to write float16 features with, image by image, and gives their code.

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


def _write(path: Path, shape: tuple[int, ...], build: Build) -> None:
    size = size_of(shape)
    with path.open("wb") as file:

        def write(part: memoryview) -> None:
            with _explaining(path.parent, size):
                file.write(part)

        with _explaining(path.parent, size):
            if size > shutil.disk_usage(path.parent).free / _GIB:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        code = build(write)
        # After the features, where numpy does not look for more of them.
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
