# SPDX-License-Identifier: Apache-2.0
"""Progress of what takes minutes, on a terminal and in a file."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(description: str, enabled: bool = True) -> Iterator[Callable[[float], None]]:
    """Show a progress bar; where there is no terminal, write it anew every twenty seconds.

    Args:
        description (str): What is done.
        enabled (bool): Whether to show anything.
            Defaults to ``True``.

    Yields:
        Callable[[float], None]: Progress callback: takes the part that is done, in [0, 1].
    """
    layout = "{l_bar}{bar}| {elapsed}<{remaining}"
    interval = 0.1 if sys.stderr.isatty() else 20.0
    with tqdm(
        total=1.0, desc=description, disable=not enabled, mininterval=interval, maxinterval=interval, bar_format=layout
    ) as bar:
        yield lambda part: bar.update(part - bar.n)
        bar.update(1.0 - bar.n)
