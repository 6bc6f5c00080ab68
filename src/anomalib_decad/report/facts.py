# SPDX-License-Identifier: Apache-2.0
"""What a report says of the run itself."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from anomalib.models import AnomalibModule
from lightning.pytorch import LightningModule, Trainer

__all__ = ["Facts", "collect_facts", "seconds"]

_PACKAGES = ("anomalib-decad", "anomalib", "torch", "lightning")

#: Characters of a value of the configuration.
_LONGEST = 300


@dataclass
class Facts:
    """What a report says of the run itself.

    Args:
        model (str): Name of the model.
        data (str): Name of the data.
        date (datetime): When the test ended.
        checkpoint (str | None): The checkpoint, if it is known.
        run (dict[str, str]): Device, durations and so on.
        configuration (dict[str, str]): Arguments of the model.
        versions (dict[str, str]): Versions of the packages.
    """

    model: str
    data: str
    date: datetime
    checkpoint: str | None = None
    run: dict[str, str] = field(default_factory=dict)
    configuration: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def collect_facts(trainer: Trainer, pl_module: LightningModule) -> Facts:
    """Collect what a report says of a run.

    Args:
        trainer (Trainer): The trainer.
        pl_module (LightningModule): The model.

    Returns:
        Facts: Without durations and numbers of images.
    """
    datamodule = getattr(trainer, "datamodule", None)
    names = [getattr(datamodule, "name", None), getattr(datamodule, "category", None)]
    data = " / ".join(dict.fromkeys(str(name) for name in names if name)) or "unnamed data"
    name = pl_module.name if isinstance(pl_module, AnomalibModule) else type(pl_module).__name__
    facts = Facts(name, data, datetime.now().astimezone(), _checkpoint_of(trainer))
    facts.run["device"] = _device_of(trainer)
    if trainer.world_size > 1:
        facts.run["processes"] = str(trainer.world_size)
    facts.run["precision"] = str(trainer.precision)
    facts.configuration = {key: _text(value) for key, value in _flatten(pl_module.hparams).items()}
    facts.versions = {package: _version_of(package) for package in _PACKAGES}
    facts.versions["python"] = platform.python_version()
    return facts


def seconds(value: float) -> str:
    """Write a duration.

    Args:
        value (float): Seconds.

    Returns:
        str: Such as ``"8.3 s"`` or ``"1 h 02 min"``.

    Example:
        >>> seconds(8.345), seconds(75), seconds(3725)
        ('8.3 s', '1 min 15 s', '1 h 02 min')
    """
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02} min" if hours else f"{minutes} min {rest:02} s"


def _checkpoint_of(trainer: Trainer) -> str | None:
    """Find the checkpoint that was tested, or else the one of the training."""
    found = trainer.ckpt_path or getattr(trainer.checkpoint_callback, "best_model_path", None)
    if not found:
        return None
    path, folder = Path(found), Path(trainer.default_root_dir)
    # A report is sent around: what is above the run's folder is nobody's business, unless it is elsewhere.
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _device_of(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"CPU ({platform.processor() or platform.machine()})" if device.type == "cpu" else str(device)


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        content = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        key = f"{prefix}{name}"
        flat |= _flatten(content, f"{key}.") if isinstance(content, Mapping) and content else {key: content}
    return flat


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
