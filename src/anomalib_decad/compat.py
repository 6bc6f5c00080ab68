# SPDX-License-Identifier: Apache-2.0
"""Every private name of another library that the package touches.

A private name may change with the next version of anomalib, Lightning, timm or torch without a word. So the functions
here are the only ones that touch any, :data:`PRIVATE_NAMES` lists them, and a test looks each of them up. Imports the
standard library only; what else is needed is imported by the functions.
"""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from anomalib.data import AnomalibDataModule
    from anomalib.post_processing import PostProcessor
    from torch import nn

    Module = TypeVar("Module", bound=nn.Module)

__all__ = [
    "PRIVATE_NAMES",
    "convert_checkpoint",
    "rename_datamodule",
    "replace_setup",
    "set_thresholds",
    "shallow_copy",
    "update_augmentations",
]

#: Module and class of each name, and what the source of the class has to contain for a name that only instances have.
PRIVATE_NAMES: tuple[tuple[str, str, str, str | None], ...] = (
    ("anomalib.post_processing.post_processor", "PostProcessor", "_image_threshold", "self._image_threshold:"),
    ("anomalib.post_processing.post_processor", "PostProcessor", "_pixel_threshold", "self._pixel_threshold:"),
    ("anomalib.post_processing.post_processor", "PostProcessor", "_normalize", None),  # inherited
    ("anomalib.data.datamodules.image.folder", "Folder", "_name", "self._name"),
    ("anomalib.data.datamodules.base.image", "AnomalibDataModule", "_update_augmentations", None),
    ("anomalib.data.datamodules.base.image", "AnomalibDataModule", "_setup", None),
    ("anomalib.models.components.base.export_mixin.mixin", "ExportMixin", "_compress_ov_model", None),
    ("timm.models.vision_transformer", "", "resample_abs_pos_embed", None),
    ("timm.models.vision_transformer", "", "checkpoint_filter_fn", None),
    ("torch.nn.modules.module", "Module", "_modules", "_modules"),
    # Overridden: hooks before it cannot give a buffer the shape that it has in a state dict and read it after.
    ("torch.nn.modules.module", "Module", "_load_from_state_dict", None),
    # Of a tensor: tells whether a parameter has changed in place since its weights were folded.
    ("torch", "Tensor", "_version", None),
)


def convert_checkpoint(network: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert weights from an architecture's original release to timm's names; ``create_model`` only warns of gaps."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    return convert(state, network) if convert else state


def set_thresholds(post_processor: PostProcessor, image: float, pixel: float) -> None:
    """Set the thresholds of anomalib's post-processor, which have no setter, in raw scores; NaN for unknown ones."""
    post_processor._image_threshold.fill_(image)
    post_processor._pixel_threshold.fill_(pixel)


def rename_datamodule(datamodule: AnomalibDataModule, name: str) -> None:
    """Set the name of a ``Folder``, which has no setter; heatmaps go to a folder of that name."""
    datamodule._name = name  # type: ignore[attr-defined]


def update_augmentations(datamodule: AnomalibDataModule) -> None:
    """Hand a datamodule's augmentations to its datasets, as ``setup`` does after making other datasets."""
    datamodule._update_augmentations()


def replace_setup(datamodule: AnomalibDataModule, setup: Callable[[str | None], None]) -> None:
    """Have one instance of a datamodule list its images in another way; its splits stay its own.

    Args:
        datamodule (AnomalibDataModule): The datamodule.
        setup (Callable[[str | None], None]): Sets ``train_data``, ``test_data``, and ``val_data`` if there is some.
    """
    vars(datamodule)["_setup"] = setup


def shallow_copy(module: Module) -> Module:
    """Copy a module, sharing parameters, buffers and submodules, so that a submodule can be replaced in the copy."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied
