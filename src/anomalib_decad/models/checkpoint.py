# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that say what their model is, and that are read or refused in one line."""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from anomalib.engine.plugins import AnomalibCheckpointIO

__all__ = ["ClearCheckpointIO", "check_checkpoint", "default_arguments", "differences", "mark_checkpoint", "to_plain"]

#: Changes when an earlier checkpoint no longer fits.
_FORMAT_KEY, _FORMAT = "anomalib_decad_format", 6

#: Name of the model's class.
_MODEL_KEY = "anomalib_decad_model"


class ClearCheckpointIO(AnomalibCheckpointIO):
    """anomalib's checkpoint IO, but a file that is no checkpoint, or only a part of one, is named in one line."""

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint from its file; arguments and result are those of Lightning's method.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no checkpoint, or only a part of one.
        """
        try:
            content = super().load_checkpoint(path, *args, **kwargs)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # torch raises of many kinds
            msg = f"{path} is no checkpoint, or only a part of one: give another, or copy it again"
            raise ValueError(msg) from error
        if not isinstance(content, dict) or "state_dict" not in content:
            msg = f"{path} is no checkpoint of a training: something else has been saved there"
            raise ValueError(msg)
        return content


def mark_checkpoint(checkpoint: dict[str, Any], cls: type) -> None:
    """Write into a checkpoint what its model is."""
    checkpoint[_FORMAT_KEY], checkpoint[_MODEL_KEY] = _FORMAT, cls.__name__


def check_checkpoint(checkpoint: Mapping[str, Any], cls: type) -> None:
    """Refuse a checkpoint of another model, of another version of this one, or with damaged weights.

    Args:
        checkpoint (Mapping[str, Any]): The checkpoint.
        cls (type): Class of the model.

    Raises:
        ValueError: If it does not fit; one line that says what to do.
    """
    found, name = checkpoint.get(_FORMAT_KEY), checkpoint.get(_MODEL_KEY)
    weights = {key: value for key, value in checkpoint["state_dict"].items() if key.startswith("model.")}
    if found is None:
        msg = f"it is no checkpoint of a {cls.__name__}: give one that a training of this model has written"
    elif name != cls.__name__:
        msg = f"the checkpoint is of a {name}: give --model {name}"
    elif found != _FORMAT:
        msg = (
            f"the checkpoint is of another version of anomalib-decad (format {found}, this version reads {_FORMAT}): "
            "train again, or install the version that it was trained with"
        )
    elif broken := [key for key, value in weights.items() if value.is_floating_point() and value.isnan().any()]:
        msg = f"the checkpoint's weights are damaged: {broken[0]} has NaN. Use a checkpoint of an earlier step"
    else:
        return
    raise ValueError(msg)


def differences(
    cls: type, names: Collection[str], given: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Any]:
    """Find the arguments that a model must take from a checkpoint to be the checkpoint's.

    Args:
        cls (type): Class of the model.
        names (Collection[str]): Arguments that say what the model is.
        given (Mapping[str, Any]): Arguments that the model was made with.
        saved (Mapping[str, Any]): Those of the checkpoint.

    Returns:
        dict[str, Any]: The arguments in which the checkpoint differs, plain values.

    Raises:
        ValueError: If one of them was given, and not left at its default.
    """
    defaults = default_arguments(cls)
    mine, theirs, usual = (_flatten(values, names) for values in (given, saved, defaults))
    wrong = {name: theirs[name] for name in theirs if mine.get(name) not in (theirs[name], usual.get(name))}
    if wrong:
        flags = " ".join(f"--model.{name} {str(value).replace(' ', '')}" for name, value in wrong.items())
        msg = (
            f"the checkpoint is of another {cls.__name__}: leave out {', '.join(wrong)}, which it knows, or give it "
            f"the arguments {flags}"
        )
        raise ValueError(msg)
    return {name: saved[name] for name in names if name in saved and to_plain(given.get(name)) != to_plain(saved[name])}


def default_arguments(cls: type) -> dict[str, Any]:
    """Collect the defaults of a model's arguments, with those that its bases take as ``**kwargs``."""
    defaults: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            defaults |= {name: parameter.default for name, parameter in inspect.signature(base).parameters.items()}
    return defaults


def to_plain(value: Any) -> Any:
    """Give an argument as a checkpoint holds it: groups as dictionaries, enums as their values, sequences as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _flatten(arguments: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """List arguments by name, those of groups as ``group.field``."""
    flat: dict[str, Any] = {}
    for name in names:
        if name in arguments:
            value = to_plain(arguments[name])
            flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return flat
