# SPDX-License-Identifier: Apache-2.0
"""Every private name of another library that the package touches, each with the reason.

The package is tested with certain versions of anomalib, Lightning, timm and Python. A private name may change with the
next one without a word. So all of them are here and nowhere else, :data:`PRIVATE_NAMES` lists them, and a test looks
each of them up: it fails with the library's version and with what to do.

This module imports the standard library only; what else it needs is imported by the functions.
"""

from __future__ import annotations

import copy
import importlib
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from anomalib.data import AnomalibDataModule
    from anomalib.post_processing import PostProcessor
    from lightning.pytorch import Trainer
    from torch import nn

    Module = TypeVar("Module", bound=nn.Module)

__all__ = [
    "PRIVATE_NAMES",
    "PrivateName",
    "antialiased_position_embeddings",
    "convert_checkpoint",
    "count_epochs_from_one",
    "is_importing",
    "marks_as_imported",
    "predict_datasets",
    "rename_datamodule",
    "replace_setup",
    "replace_threshold_metrics",
    "set_root_folder",
    "set_training_steps",
    "shallow_copy",
    "training_iterator",
    "update_augmentations",
]


@dataclass(frozen=True)
class PrivateName:
    """A private name that the package relies on.

    Args:
        package (str): Name of the package that has it, as on a package index; ``"python"`` for the standard library.
        module (str): Module of the class or object that has it.
        owner (str): The class, or an empty string where the module has it itself.
        name (str): The name.
        source (str | None): Text that the source of the owner must contain, for names that only instances have.
        public_way (str): What was tried instead, and why it does not do.
        remedy (str): What to do when the name is gone.
    """

    package: str
    module: str
    owner: str
    name: str
    source: str | None
    public_way: str
    remedy: str


PRIVATE_NAMES = (
    PrivateName(
        "anomalib",
        "anomalib.post_processing.post_processor",
        "PostProcessor",
        "_image_threshold_metric",
        "self._image_threshold_metric",
        "A subclass can only replace all three of its validation hooks, and with them normalization.",
        "See what finds the thresholds now, and mend replace_threshold_metrics.",
    ),
    PrivateName(
        "anomalib",
        "anomalib.post_processing.post_processor",
        "PostProcessor",
        "_pixel_threshold_metric",
        "self._pixel_threshold_metric",
        "As for _image_threshold_metric.",
        "See what finds the thresholds now, and mend replace_threshold_metrics.",
    ),
    PrivateName(
        "anomalib",
        "anomalib.data.datamodules.image.folder",
        "Folder",
        "_name",
        "self._name",
        "The property ``name`` has no setter, and heatmaps go to a folder of that name.",
        "See where Folder keeps its name, and mend rename_datamodule.",
    ),
    PrivateName(
        "anomalib",
        "anomalib.data.datamodules.base.image",
        "AnomalibDataModule",
        "_update_augmentations",
        None,
        "``setup`` calls it, but sets up the datasets before, which MultiCategory does itself.",
        "See where augmentations reach the datasets now, and mend update_augmentations.",
    ),
    PrivateName(
        "anomalib",
        "anomalib.data.datamodules.base.image",
        "AnomalibDataModule",
        "_setup",
        None,
        "``setup`` always calls it; a subclass of each datamodule would not be that datamodule.",
        "See what lists the images of a datamodule now, and mend replace_setup.",
    ),
    PrivateName(
        "lightning",
        "lightning.pytorch.loops.fit_loop",
        "_FitLoop",
        "max_epochs",
        "self.max_epochs",
        "Trainer arguments come before the model's hooks, and max_steps has no setter on the trainer.",
        "See how the trainer's number of steps can be set in setup(), and mend set_training_steps.",
    ),
    PrivateName(
        "lightning",
        "lightning.pytorch.loops.training_epoch_loop",
        "_TrainingEpochLoop",
        "max_steps",
        "self.max_steps",
        "As for max_epochs.",
        "See how the trainer's number of steps can be set in setup(), and mend set_training_steps.",
    ),
    PrivateName(
        "lightning",
        "lightning.pytorch.trainer.trainer",
        "Trainer",
        "_default_root_dir",
        "self._default_root_dir",
        "default_root_dir has no setter, and anomalib's Engine has made the trainer when a model is first asked.",
        "See where the trainer keeps its folder, and mend set_root_folder.",
    ),
    PrivateName(
        "lightning",
        "lightning.pytorch.loops.prediction_loop",
        "_PredictionLoop",
        "_data_source",
        "self._data_source",
        "trainer.predict_dataloaders are there when the first image has been read already.",
        "See where the trainer keeps the dataloaders of a prediction, and mend predict_datasets.",
    ),
    PrivateName(
        "lightning",
        "lightning.pytorch.loops.fit_loop",
        "_FitLoop",
        "_data_fetcher",
        "self._data_fetcher",
        "A dataloader with state_dict() is asked for it, but Lightning makes another of it for several processes.",
        "See where the trainer keeps its iterator over the training batches, and mend training_iterator.",
    ),
    PrivateName(
        "lightning",
        "lightning.pytorch.callbacks.progress.rich_progress",
        "RichProgressBar",
        "_get_train_description",
        None,
        "A bar of one's own would take the place of the one that the user has chosen.",
        "See what names an epoch beside the bar now, and mend count_epochs_from_one.",
    ),
    PrivateName(
        "timm",
        "timm.models.vision_transformer",
        "",
        "resample_abs_pos_embed",
        None,
        "anomalib's TimmFeatureExtractor replaces this global of timm's; there is no argument for it.",
        "See how timm resamples position embeddings now, and mend antialiased_position_embeddings.",
    ),
    PrivateName(
        "timm",
        "timm.models.vision_transformer",
        "",
        "checkpoint_filter_fn",
        None,
        "create_model(pretrained_cfg_overlay=...) converts, too, but only warns where weights are missing.",
        "See how timm converts the key names of original releases now, and mend convert_checkpoint.",
    ),
    PrivateName(
        "torch",
        "torch.nn.modules.module",
        "Module",
        "_modules",
        "_modules",
        "copy.copy shares the submodules' dictionary with the original; copy.deepcopy copies all weights twice.",
        "See where a module keeps its submodules, and mend shallow_copy.",
    ),
    PrivateName(
        "python",
        "importlib._bootstrap",
        "ModuleSpec",
        "_initializing",
        None,
        "The import system has no hook that runs when a module has been imported.",
        "See how the import system tells modules that are being imported, and mend is_importing.",
    ),
)


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


def replace_threshold_metrics(post_processor: PostProcessor, image: Any, pixel: Any) -> None:
    """Give anomalib's post-processor other metrics to find its thresholds with.

    Args:
        post_processor (PostProcessor): The post-processor.
        image (Any): Metric with ``update(batch)`` and ``compute()`` for the threshold of images.
        pixel (Any): The same for that of pixels.
    """
    post_processor._image_threshold_metric = image
    post_processor._pixel_threshold_metric = pixel


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


def find(private: PrivateName) -> Any:
    """Look a private name up.

    Args:
        private (PrivateName): The name.

    Returns:
        Any: The class or module that has it.

    Raises:
        AttributeError: If it is gone.
    """
    if private.owner == "ModuleSpec":
        owner: Any = importlib.import_module("json").__spec__  # only those of imported modules have it
    else:
        owner = importlib.import_module(private.module)
        owner = getattr(owner, private.owner) if private.owner else owner
    if private.source is None:
        getattr(owner, private.name)
    elif private.source not in _source_of(owner):
        raise AttributeError(private.name)
    return owner


def _source_of(owner: Any) -> str:
    import inspect

    return inspect.getsource(owner)
