# SPDX-License-Identifier: Apache-2.0
"""How far something is that takes minutes: a bar on a terminal, and lines of the log in a file."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import get_console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["showing_progress"]

logger = logging.getLogger(__name__)

#: Seconds between two lines of the log, and the part of the work between them.
_INTERVAL, _PART = 5.0, 0.1


@contextmanager
def showing_progress(description: str, enabled: bool = True) -> Iterator[Callable[[float], None]]:
    """Show how far something is.

    Args:
        description (str): What is done.
        enabled (bool): Whether to show anything.
            Defaults to ``True``.

    Yields:
        Callable[[float], None]: Is to be told the part that is done, in [0, 1].
    """
    console = get_console()
    if not enabled:
        yield lambda _: None
    elif console.is_terminal or console.is_jupyter:
        times = TimeElapsedColumn(), TimeRemainingColumn()
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), *times
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(description, total=1.0)
            yield lambda part: progress.update(task, completed=part)
            progress.update(task, completed=1.0)
    else:
        lines = _Lines(description)
        yield lines.update
        lines.end()


class _Lines:
    """Writes a line to the log now and then."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.start = self.last_time = time.monotonic()
        self.last_part = 0.0

    def update(self, part: float) -> None:
        now = time.monotonic()
        if part < 1 and part - self.last_part >= _PART and now - self.last_time >= _INTERVAL:
            logger.info("%s: %.0f %% after %.0f s", self.description, 100 * part, now - self.start)
            self.last_time, self.last_part = now, part

    def end(self) -> None:
        logger.info("%s: took %.0f s", self.description, time.monotonic() - self.start)
