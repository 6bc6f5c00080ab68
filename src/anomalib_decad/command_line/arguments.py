# SPDX-License-Identifier: Apache-2.0
"""Which model a command is about, before anything has been imported that could parse it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

__all__ = ["names_model"]

_PACKAGES = {"", "anomalib", __name__.partition(".")[0]}

#: The model in a YAML or JSON file: ``model: NAME``, or its ``class_path``.
_IN_FILE = re.compile(r"^\s*\{?\s*[\"']?model[\"']?\s*:\s*\{?\s*(?:[\"']?class_path[\"']?\s*:\s*)?[\"']?([\w.]+)", re.M)

#: Larger files are no configuration.
_LARGEST_FILE = 2**20


def names_model(command: Sequence[str], names: Collection[str]) -> bool:
    """Tell whether a command is anomalib's, about one of some models.

    The parser itself decides later. This is to know it before anomalib is imported, which already warns.

    Args:
        command (Sequence[str]): The command, as in ``sys.argv``.
        names (Collection[str]): Names of the models' classes.

    Returns:
        bool: Whether the last model that the command or its configuration file names is one of them.
    """
    if not command or Path(command[0]).stem.removesuffix("-script") != "anomalib":
        return False
    last = ""
    for last in _models(command[1:]):  # noqa: B007
        pass
    package, _, name = last.rpartition(".")
    return name in names and package.partition(".")[0] in _PACKAGES


def _models(arguments: Sequence[str]) -> Iterator[str]:
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not equals:
            value = arguments[index + 1] if index + 1 < len(arguments) else ""
        if option in {"--model", "--model.class_path", "--model.help"}:
            yield value
        elif option in {"-c", "--config"}:
            yield from _IN_FILE.findall(_read(Path(value)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size < _LARGEST_FILE else ""
    except (OSError, ValueError):
        return ""
