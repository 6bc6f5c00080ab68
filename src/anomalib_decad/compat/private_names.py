# SPDX-License-Identifier: Apache-2.0
"""The list of private names that the package uses, and where they should be."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

__all__ = ["PRIVATE_NAMES", "PrivateName", "find"]


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
        "_image_threshold",
        "self._image_threshold: torch.Tensor",
        "The property ``image_threshold`` has no setter, and a threshold that is set must be saved with the model.",
        "See where the thresholds are kept, and mend set_thresholds.",
    ),
    PrivateName(
        "anomalib",
        "anomalib.post_processing.post_processor",
        "PostProcessor",
        "_pixel_threshold",
        "self._pixel_threshold: torch.Tensor",
        "As for _image_threshold.",
        "See where the thresholds are kept, and mend set_thresholds.",
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
        "lightning.pytorch.core.module",
        "LightningModule",
        "_trainer",
        "self._trainer",
        "The property ``trainer`` raises an error where there is none, which a hook of another property would hide.",
        "See how a module tells whether it is in a trainer, and mend trainer_of.",
    ),
    PrivateName(
        "torch",
        "torch.nn.modules.module",
        "Module",
        "_load_from_state_dict",
        None,
        "Pre-hooks of a state dict cannot give a buffer the shape that it has there before, and read it after.",
        "See what loads the buffers of a module, and mend CategoryRecognizer and CategoryPostProcessor.",
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
