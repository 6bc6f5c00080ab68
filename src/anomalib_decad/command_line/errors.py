# SPDX-License-Identifier: Apache-2.0
"""Errors that are said to the user, told from those that are faults of the program."""

from __future__ import annotations

import dis
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["line_of"]

_PACKAGE = __name__.partition(".")[0]

#: What Python itself and careless code raise: never meant for the user.
_FAULTS = (AssertionError, AttributeError, NameError, NotImplementedError)

#: What Lightning and anomalib raise for arguments that are wrong, as a file that is not there or a device that is not.
_WRONG_ARGUMENTS = frozenset(
    {
        "FileNotFoundError",
        "MisconfigurationException",
        "ModuleNotFoundError",
        "NotADirectoryError",
        "PermissionError",
    }
)
_OTHER_PACKAGES = frozenset({"anomalib", "lightning", "lightning_fabric", "pytorch_lightning"})

#: How torch passes an error on from a process that loads data: the traceback as text, which ends with the message.
_IN_WORKER = re.compile(
    r"Caught \w+ in DataLoader worker process \d+\.\n.*\n  File \"([^\"\n]*)\", line \d+, in [^\n]*\n    raise ", re.S
)


def line_of(error: BaseException) -> str | None:
    """Find what to say to the user where an error was raised on purpose.

    That is every error that a ``raise`` of this package has raised, and those of Lightning and anomalib that say by
    their class that an argument is wrong.

    Args:
        error (BaseException): The error.

    Returns:
        str | None: Its message, in one line; ``None`` if the error, and all that it was raised from, is a fault.
    """
    current: BaseException | None = error
    while current is not None:
        message = str(current) if _is_deliberate(current) else _worker_message(current)
        if message:
            return " ".join(message.split())
        current = current.__cause__
    return None


def _is_deliberate(error: BaseException) -> bool:
    """Tell whether a ``raise`` statement of this package, or one about a wrong argument, raised an error."""
    traceback = error.__traceback__
    if traceback is None or isinstance(error, _FAULTS):
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    package = str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    is_theirs = package in _OTHER_PACKAGES and type(error).__name__ in _WRONG_ARGUMENTS
    return (package == _PACKAGE or is_theirs) and _is_raise(traceback)


def _is_raise(traceback: TracebackType) -> bool:
    # A fault in the package's own lines, as in unpacking, ends there as well, but at another instruction.
    return traceback.tb_frame.f_code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _worker_message(error: BaseException) -> str | None:
    """Find the message of an error that this package raised in a process that loads data."""
    text = str(error)
    match = _IN_WORKER.match(text)
    if match is None or isinstance(error, _FAULTS) or _PACKAGE not in re.split(r"[/\\]", match[1]):
        return None
    rest = text[match.end() :].partition("\n")[2]
    # Where another frame follows, that one raised it.
    return None if '  File "' in rest else rest.partition(": ")[2].strip() or None
