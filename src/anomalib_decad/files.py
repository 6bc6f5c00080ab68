# SPDX-License-Identifier: Apache-2.0
"""Files that appear when they are complete."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["atomic_write", "write_text_atomically"]


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file beside its place, and move it there when it is complete.

    Args:
        path (Path): The file. Its folder exists.

    Yields:
        Path: Where to write it. After an error it is gone, and what was in the file's place is still there.
    """
    # The same name each time: what a killed process has left is written over.
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file atomically, and make its folder.

    Args:
        path (Path): The file.
        text (str): Its text, written as UTF-8. Names of files that are no UTF-8 are written with question marks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")
