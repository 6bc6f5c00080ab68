# SPDX-License-Identifier: Apache-2.0
"""Folders of runs: those of failed runs go again, and ``latest`` can be moved with them."""

from __future__ import annotations

import functools
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Folders"]

#: What anomalib writes into the folder of a run before anything has been done.
_WRITTEN_AT_ONCE = {"config.yaml"}


class Folders:
    """Watches which folders a command makes for its results."""

    def __init__(self) -> None:
        #: Each folder, and the highest one above it that was there before.
        self._made: list[tuple[Path, Path]] = []
        self._release: list[tuple[ModuleType, object]] = []

    def watch(self, engine_module: ModuleType) -> None:
        """Notice the folders that anomalib makes from now on.

        Args:
            engine_module (ModuleType): ``anomalib.engine.engine``, which calls ``create_versioned_dir``.
        """
        create = engine_module.create_versioned_dir

        @functools.wraps(create)
        def create_versioned_dir(root_dir: str | Path) -> Path:
            above = _existing(Path(root_dir).resolve())
            folder = Path(create(root_dir))
            self._made.append((folder, above))
            with suppress(OSError):
                _make_relative(folder)
            return folder

        self._release.append((engine_module, create))
        engine_module.create_versioned_dir = create_versioned_dir  # type: ignore[attr-defined]

    def release(self) -> None:
        """Leave anomalib as it was."""
        while self._release:
            module, original = self._release.pop()
            module.create_versioned_dir = original  # type: ignore[attr-defined]

    def remove_unused(self) -> None:
        """Remove the folders in which there is no result, and those that were made for them."""
        for folder, above in self._made:
            with suppress(OSError):
                if not any(path.is_file() and path.name not in _WRITTEN_AT_ONCE for path in folder.rglob("*")):
                    shutil.rmtree(folder)
                    _mend_latest(folder.parent)
                    _remove_empty(folder.parent, above)


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _make_relative(folder: Path) -> None:
    """Have the link ``latest`` beside a folder say its name only: results can be moved, or mounted elsewhere."""
    latest = folder.parent / "latest"
    # On Windows it may be a junction, which is absolute.
    if os.name != "nt" and latest.is_symlink() and latest.resolve() == folder.resolve():
        _link(latest, folder.name)


def _mend_latest(root: Path) -> None:
    """Point ``latest`` to the run before, if its own has gone."""
    latest = root / "latest"
    if not os.path.lexists(latest) or latest.exists():
        return
    runs = [path for path in root.iterdir() if path.is_dir() and re.fullmatch(r"v\d+", path.name)]
    if runs:
        _link(latest, max(runs, key=lambda path: int(path.name[1:])).name)
    else:
        latest.unlink()


def _link(latest: Path, target: str) -> None:
    # Replaced at once: another process may be looking.
    partial = latest.with_name(f".latest-{os.getpid()}")
    partial.symlink_to(target, target_is_directory=True)
    partial.replace(latest)


def _remove_empty(folder: Path, above: Path) -> None:
    while folder != above and above in folder.parents:
        folder.rmdir()
        folder = folder.parent
