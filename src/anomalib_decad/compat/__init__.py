# SPDX-License-Identifier: Apache-2.0
"""Every private name of another library that the package touches, each with the reason.

The package is tested with certain versions of anomalib, Lightning, timm and Python. A private name may change with the
next one without a word. So all of them are here and nowhere else, :data:`PRIVATE_NAMES` lists them, and a test looks
each of them up: it fails with the library's version and with what to do.

This module imports the standard library only; what else it needs is imported by the functions.
"""

from __future__ import annotations

import copy
import re
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from anomalib_decad.compat.private_names import PRIVATE_NAMES, PrivateName, find

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from anomalib.data import AnomalibDataModule
    from anomalib.post_processing import PostProcessor
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

    Module = TypeVar("Module", bound=nn.Module)

__all__ = [
    "PRIVATE_NAMES",
    "PrivateName",
    "antialiased_position_embeddings",
    "convert_checkpoint",
    "count_epochs_from_one",
    "find",
    "is_importing",
    "marks_as_imported",
    "predict_datasets",
    "rename_datamodule",
    "replace_setup",
    "set_root_folder",
    "set_thresholds",
    "set_training_steps",
    "shallow_copy",
    "trainer_of",
    "training_iterator",
    "update_augmentations",
]


@contextmanager
def antialiased_position_embeddings(vit: nn.Module) -> Iterator[None]:
    """Let timm resample position embeddings with antialiasing.

    anomalib's TimmFeatureExtractor switches it off for the whole process: a model would give other scores once, say, a
    Dinomaly has been created.

    Args:
        vit (nn.Module): A timm vision transformer.

    Yields:
        None: While its module has timm's own function.
    """
    from timm.layers import resample_abs_pos_embed

    module: Any = sys.modules[type(vit).__module__]
    current = getattr(module, "resample_abs_pos_embed", None)
    if current is None or current is resample_abs_pos_embed:
        yield
        return
    module.resample_abs_pos_embed = resample_abs_pos_embed
    try:
        yield
    finally:
        module.resample_abs_pos_embed = current


def convert_checkpoint(network: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert the key names of an architecture's original release to timm's.

    Args:
        network (nn.Module): A timm network.
        state (Mapping[str, Any]): Weights in timm's names, or in those of the original release.

    Returns:
        Mapping[str, Any]: The weights in timm's names.
    """
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    return convert(state, network) if convert else state


def count_epochs_from_one(progress_bar: Any) -> None:
    """Have a progress bar of Lightning's name the epochs 1/4 to 4/4, not 0/3 to 3/3.

    Args:
        progress_bar (Any): The bar; others than the one of rich, and ``None``, stay as they are.
    """
    if not hasattr(progress_bar, "_get_train_description"):
        return

    def describe(current_epoch: int) -> str:
        # By its class at that time: anomalib changes it when the training starts.
        text = type(progress_bar)._get_train_description(progress_bar, current_epoch)
        return re.sub(r"\d+", lambda match: str(int(match[0]) + 1), text, count=2)

    progress_bar._get_train_description = describe


def set_thresholds(post_processor: PostProcessor, image: float, pixel: float) -> None:
    """Set the thresholds of anomalib's post-processor, in raw scores; NaN for one that is unknown."""
    post_processor._image_threshold.fill_(image)
    post_processor._pixel_threshold.fill_(pixel)


def rename_datamodule(datamodule: AnomalibDataModule, name: str) -> None:
    """Set the name of one of anomalib's ``Folder`` datamodules."""
    datamodule._name = name  # type: ignore[attr-defined]


def update_augmentations(datamodule: AnomalibDataModule) -> None:
    """Hand a datamodule's augmentations to its datasets, as anomalib does in ``setup``."""
    datamodule._update_augmentations()


def replace_setup(datamodule: AnomalibDataModule, setup: Callable[[str | None], None]) -> None:
    """Have a datamodule list its images in another way; its splits stay its own.

    Args:
        datamodule (AnomalibDataModule): The datamodule, of which no other instance changes.
        setup (Callable[[str | None], None]): Sets ``train_data``, ``test_data``, and ``val_data`` if there is some.
    """
    vars(datamodule)["_setup"] = setup


def set_root_folder(trainer: Trainer, folder: Path) -> None:
    """Set the folder that a trainer writes to, before its callbacks are set up."""
    trainer._default_root_dir = str(folder)  # type: ignore[attr-defined]


def predict_datasets(trainer: Trainer) -> list[Any]:
    """List the datasets of a prediction before its first image is read.

    Args:
        trainer (Trainer): The trainer, in ``setup`` of a prediction.

    Returns:
        list[Any]: The datasets of the dataloaders that it was given; none of a datamodule's.
    """
    source: Any = trainer.predict_loop._data_source.instance
    loaders = source if isinstance(source, (list, tuple)) else [source]
    return [loader.dataset for loader in loaders if hasattr(loader, "dataset")]


def set_training_steps(trainer: Trainer, steps: int) -> None:
    """Set how many steps a trainer trains, when its own arguments do not say so.

    Args:
        trainer (Trainer): The trainer, before the training begins.
        steps (int): Number of steps.
    """
    trainer.fit_loop.epoch_loop.max_steps = steps
    trainer.fit_loop.max_epochs = -1


def shallow_copy(module: Module) -> Module:
    """Copy a module so that its submodules can be replaced in the copy alone.

    Args:
        module (Module): Any module.

    Returns:
        Module: The copy, which shares parameters, buffers and submodules.
    """
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def trainer_of(module: LightningModule) -> Trainer | None:
    """Give the trainer of a module; ``None`` if it is in none.

    Args:
        module (LightningModule): The module.

    Returns:
        Trainer | None: The trainer.
    """
    return module._trainer


def training_iterator(trainer: Trainer) -> Iterator[Any]:
    """Give the iterator that a training takes its batches from."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    return fetcher.iterator


def is_importing(name: str) -> bool:
    """Tell whether a module is being imported right now.

    Args:
        name (str): Name of the module.

    Returns:
        bool: Whether its import has begun, but not ended.
    """
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


def marks_as_imported(name: str, value: Any) -> bool:
    """Tell whether setting an attribute of a ``ModuleSpec`` marks its module as imported.

    Args:
        name (str): Name of the attribute.
        value (Any): Its new value.

    Returns:
        bool: Whether that is what the import system does when a module has been imported.
    """
    return name == "_initializing" and not value
