# SPDX-License-Identifier: Apache-2.0
"""Features of images, computed once and kept in memory or on disk."""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import Dataset

__all__ = [
    "GIB",
    "CachedFeatures",
    "FeatureBatch",
    "FeatureCode",
    "FeatureFile",
    "default_folder",
    "fingerprint",
    "num_bytes",
]

logger = logging.getLogger(__name__)

_FEATURES, _CODE, _DONE = "features.npy", "code.npy", "done.json"
GIB = 2**30


def default_folder() -> Path:
    """Name the folder of caches: ``anomalib_decad`` in the user's cache folder (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anomalib_decad"


def num_bytes(shape: Sequence[int]) -> int:
    """Compute the size of float16 features of a shape."""
    return 2 * math.prod(shape)


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


@dataclass
class FeatureCode:
    """How features become float16 and back: ``(features - offset) / scale``.

    A few channels of a vision transformer are large and nearly constant. Without the code float16 would round away
    what varies in them.

    Args:
        offset (torch.Tensor): Shape (taps, 1, dim).
        scale (torch.Tensor): Shape (taps, 1, dim), positive.
    """

    offset: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "FeatureCode":
        """Choose a code by features of shape (B, taps, N, dim)."""
        std, mean = torch.std_mean(features.float(), dim=(0, 2))
        return cls(mean.unsqueeze(1), std.clamp(min=1e-6).unsqueeze(1))

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Make float16 of features of shape (..., taps, N, dim)."""
        return ((features.float() - self.offset) / self.scale).clamp(-65504, 65504).half()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Make float32 features of what :meth:`encode` gave, on its device."""
        return torch.addcmul(self.offset.to(codes.device), codes.float(), self.scale.to(codes.device))


@dataclass
class FeatureBatch:
    """Features in place of images. What anomalib's pre-processor would transform is ``None``.

    Args:
        codes (torch.Tensor): Encoded features, float16 of shape (B, taps, N, dim).
        code (FeatureCode): Their code.
        grid (tuple[int, int]): Patch rows and columns, N = rows * columns.
    """

    codes: torch.Tensor
    code: FeatureCode
    grid: tuple[int, int]
    image: None = None
    gt_mask: None = None

    def features(self) -> list[torch.Tensor]:
        """Decode to a list of float32 feature maps of shape (B, N, dim), one for each tap."""
        return list(self.code.decode(self.codes).unbind(1))


class CachedFeatures(Dataset):
    """Dataset of features, in the place of a dataset of images; :meth:`fill` gives it the features.

    Args:
        images (Any): The anomalib dataset of images.
    """

    def __init__(self, images: Any) -> None:
        self.images = images
        self.samples = images.samples

    def fill(self, features: np.ndarray | Path, code: FeatureCode, grid: tuple[int, int]) -> None:
        """Set the features.

        Args:
            features (np.ndarray | Path): float16 of shape (images, taps, N, dim), or a file of them, which is then
                read through a memory map.
            code (FeatureCode): The code of the features.
            grid (tuple[int, int]): Patch rows and columns, N = rows * columns.
        """
        self.source, self.code, self.grid = features, code, grid
        self._map: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the memory map, which would be pickled as an array: worker processes open it anew."""
        return {**self.__dict__, "_map": None}

    @property
    def features(self) -> np.ndarray:
        """The array, which may be a memory map."""
        if isinstance(self.source, np.ndarray):
            return self.source
        if self._map is None:
            self._map = np.load(self.source, mmap_mode="r")
        return self._map

    def __len__(self) -> int:
        """Count the images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> np.ndarray:
        """Read the encoded features of an image, shape (taps, N, dim)."""
        return self.features[index]

    def collate_fn(self, items: Sequence[np.ndarray]) -> FeatureBatch:
        """Make a batch of items."""
        return FeatureBatch(torch.from_numpy(np.stack(items)), self.code, self.grid)


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

    @property
    def is_complete(self) -> bool:
        """Whether there is something to read."""
        return (self.path / _DONE).is_file()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing the same cache; they wait."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            yield

    def create(self, shape: tuple[int, ...], limit: float) -> None:
        """Begin to write: make room, and allocate a partial file.

        Args:
            shape (tuple[int, ...]): Shape (images, taps, N, dim).
            limit (float): GiB that all caches in the folder may take. The least recently used ones are deleted.

        Raises:
            OSError: If the disk has too little space.
        """
        shutil.rmtree(self.partial, ignore_errors=True)
        size = num_bytes(shape)
        self._make_room(limit * GIB - size)
        free = shutil.disk_usage(self.folder).free
        if size > free:
            msg = (
                f"feature_cache: the features need {size / GIB:.1f} GiB, but {self.folder} has only {free / GIB:.1f} "
                "left. Give another folder (feature_cache_dir) or train without (feature_cache=off)"
            )
            raise OSError(msg)
        self.partial.mkdir(parents=True)
        np.lib.format.open_memmap(self.partial / _FEATURES, mode="w+", dtype=np.float16, shape=shape).flush()

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
        (self.partial / _DONE).write_text(json.dumps({"format": 1}))
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

    def _make_room(self, allowed: float) -> None:
        """Delete the least recently used caches until the rest takes no more than some bytes."""
        done = sorted(self.folder.glob(f"*/{_DONE}"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in done:
            allowed -= (path.parent / _FEATURES).stat().st_size
            if allowed < 0:
                logger.info("Deleting the feature cache %s to keep to feature_cache_limit.", path.parent)
                # The mark first: what is left of a deletion that is cut short is no cache.
                path.unlink()
                shutil.rmtree(path.parent, ignore_errors=True)
