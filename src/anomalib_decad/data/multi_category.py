# SPDX-License-Identifier: Apache-2.0
"""Many categories of a dataset in one anomalib datamodule."""

import copy
import importlib
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import anomalib.data
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset, Folder
from anomalib.data.utils import TestSplitMode, ValSplitMode
from lightning.pytorch.utilities.types import TRAIN_DATALOADERS
from torch.utils.data import DataLoader, WeightedRandomSampler
from torchvision.transforms.v2 import Transform

from anomalib_decad.compat import rename_datamodule, update_augmentations
from anomalib_decad.data.category_dataset import CategoryDataset

__all__ = ["MultiCategory"]

logger = logging.getLogger(__name__)

_SUBSETS = ("train", "val", "test")


class MultiCategory(AnomalibDataModule):
    """Several categories of a dataset at once: one model is trained on all of them and tested on each.

    It holds one datamodule for each category and joins their images. Downloads, splits and reading are theirs. Each
    batch has a field ``category`` with the category of each image. It works with every anomalib model.

    Args:
        datamodule (str | type[AnomalibDataModule] | AnomalibDataModule | Sequence[AnomalibDataModule]): What is
            wrapped: the name or class of one of anomalib's datamodules that have categories (MVTecAD, MVTecAD2,
            MVTecLOCO, Visa, RealIAD, BTech, MPDD, Kaputt, AutoVI, ...) or of ``Folder``, whose categories are the
            folders in ``root``; an instance of one, whose settings then hold for every category; or a list of
            instances, each of which is a category.
        categories (Sequence[str] | None): Names of the categories.
            Defaults to ``None``: all that the dataset defines, or, where ``root`` has none of these, all in ``root``.
        root (Path | str | None): Folder of the dataset, with a folder for each category.
            Defaults to ``None``: that of the wrapped datamodule.
        sampling (Literal["auto", "natural", "balanced"]): How training images are drawn: each once in an epoch
            (natural), or from every category equally often, with replacement (balanced).
            Defaults to ``"auto"``: balanced, but natural where a training is a single epoch, as that of memory banks:
            with replacement, it would miss images.
        train_batch_size (int): Images in a training batch.
            Defaults to ``16``.
        eval_batch_size (int): Images in a validation, test or prediction batch.
            Defaults to ``32``.
        num_workers (int): Processes that read images.
            Defaults to ``8``.
        train_augmentations (Transform | None): Augmentations of training images.
        val_augmentations (Transform | None): Augmentations of validation images.
        test_augmentations (Transform | None): Augmentations of test images.
        augmentations (Transform | None): Augmentations of images whose stage has none of its own.
        test_split_mode (TestSplitMode | str | None): Where test images come from.
            Defaults to ``None``: as the wrapped datamodule has it. So with the three that follow.
        test_split_ratio (float | None): Share of images for the test set.
        val_split_mode (ValSplitMode | str | None): Where validation images come from.
        val_split_ratio (float | None): Share of images for the validation set.
        seed (int | None): Seed of random splits.
        datamodule_args (Mapping[str, Any] | None): Further arguments of the wrapped datamodule, for example
            ``{"resolution": 512}`` for RealIAD or ``{"normal_dir": "good", "abnormal_dir": "bad"}`` for Folder.

    Raises:
        ValueError: If the datamodule has no categories, or a name or an argument is wrong; the message lists the valid
            ones.

    Example:
        >>> datamodule = MultiCategory("MVTecAD", categories=["bottle", "grid"], root="./datasets/MVTecAD")
        >>> datamodule.setup()  # doctest: +SKIP
        >>> next(iter(datamodule.train_dataloader())).category[:3]  # doctest: +SKIP
        ['grid', 'bottle', 'grid']
    """

    def __init__(
        self,
        datamodule: str | type[AnomalibDataModule] | AnomalibDataModule | Sequence[AnomalibDataModule],
        categories: Sequence[str] | None = None,
        root: Path | str | None = None,
        sampling: Literal["auto", "natural", "balanced"] = "auto",
        train_batch_size: int = 16,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str | None = None,
        test_split_ratio: float | None = None,
        val_split_mode: ValSplitMode | str | None = None,
        val_split_ratio: float | None = None,
        seed: int | None = None,
        datamodule_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=test_split_mode,
            test_split_ratio=test_split_ratio,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        if sampling not in {"auto", "natural", "balanced"}:
            msg = f"sampling must be 'auto', 'natural' or 'balanced', got {sampling!r}"
            raise ValueError(msg)
        self.sampling = sampling
        settings = {
            "root": root,
            "test_split_mode": test_split_mode,
            "test_split_ratio": test_split_ratio,
            "val_split_mode": val_split_mode,
            "val_split_ratio": val_split_ratio,
            "seed": seed,
            **(datamodule_args or {}),
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        self.datamodules = _create_datamodules(datamodule, categories, settings)
        self._are_set_up = False
        roots = {str(getattr(module, "root", None)) for module in self.datamodules.values()}
        first_root = getattr(next(iter(self.datamodules.values())), "root", None)
        if first_root is not None:
            common = Path(first_root) if len(roots) == 1 else Path(first_root).parent
            self._name = common.resolve().name or type(self).__name__
        else:
            self._name = type(self).__name__

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the dataset: that of the folder which holds the categories."""
        return self._name

    @property
    def categories(self) -> list[str]:
        """Names of the categories."""
        return list(self.datamodules)

    def prepare_data(self) -> None:
        """Download what is missing, as the wrapped datamodules do it."""
        for module in self.datamodules.values():
            module.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up the datasets of all categories and join them.

        Args:
            stage (str | None): Unused: as in anomalib, all subsets are created at once.
        """
        if not self._are_set_up:
            self._setup(stage)
            self._are_set_up = True
        update_augmentations(self)

    def _setup(self, _stage: str | None = None) -> None:
        for category, module in self.datamodules.items():
            module.num_workers = 0  # its loaders read nothing: only their datasets are wanted
            try:
                module.setup(_stage)
            except (FileNotFoundError, RuntimeError) as error:
                msg = f"the category {category!r} cannot be read: {error}"
                raise type(error)(msg) from error
        for subset in _SUBSETS:
            datasets: dict[str, AnomalibDataset] = {
                # The loader's dataset, because a datamodule may choose between several (MVTecAD2's test_type).
                category: getattr(module, f"{subset}_dataloader")().dataset
                for category, module in self.datamodules.items()
                if hasattr(module, f"{subset}_data")
            }
            if datasets:
                setattr(self, f"{subset}_data", CategoryDataset(datasets))
        # anomalib writes heatmaps to the part of an image's path behind this name. Where links lead out of the folder
        # of that name, equally named images of two categories would overwrite each other.
        paths = [Path(path) for path in self.test_data.samples.image_path]
        if not all(self._name in path.parts for path in paths):
            self._name = Path(os.path.commonpath(paths)).name or self._name
        logger.info(
            "%s: %s",
            self.name,
            ", ".join(
                f"{len(getattr(self, f'{subset}_data'))} {subset} images"
                for subset in _SUBSETS
                if hasattr(self, f"{subset}_data")
            ),
        )

    @property
    def _is_balanced(self) -> bool:
        if self.sampling == "auto":
            return self.trainer is not None and self.trainer.max_epochs != 1
        return self.sampling == "balanced"

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        """Create the training dataloader, with the chosen sampling."""
        if not self._is_balanced:
            return super().train_dataloader()
        category = self.train_data.samples["category"]
        weights = 1 / category.map(category.value_counts()).to_numpy(dtype=float)
        return DataLoader(
            dataset=self.train_data,
            sampler=WeightedRandomSampler(torch.from_numpy(weights).tolist(), num_samples=len(weights)),
            batch_size=self.train_batch_size,
            num_workers=self.num_workers,
            collate_fn=self.external_collate_fn or self.train_data.collate_fn,
        )


def _create_datamodules(
    datamodule: str | type[AnomalibDataModule] | AnomalibDataModule | Sequence[AnomalibDataModule],
    categories: Sequence[str] | None,
    settings: dict[str, Any],
) -> dict[str, AnomalibDataModule]:
    """Create a datamodule for each category."""
    if isinstance(categories, str):
        categories = [categories]
    if isinstance(datamodule, Sequence) and not isinstance(datamodule, str):
        return _name_datamodules(datamodule, categories, settings)
    if isinstance(datamodule, AnomalibDataModule):
        if settings:
            msg = f"{', '.join(settings)}: give these to the {type(datamodule).__name__} that is wrapped"
            raise ValueError(msg)
        template = datamodule
    else:
        template = _create_template(_find_class(datamodule), settings)
    names = _choose_categories(template, categories)
    return {name: _with_category(template, name) for name in names}


def _name_datamodules(
    datamodules: Sequence[AnomalibDataModule], categories: Sequence[str] | None, settings: dict[str, Any]
) -> dict[str, AnomalibDataModule]:
    """Take a list of datamodules for the categories."""
    if settings:
        msg = f"{', '.join(settings)}: give these to the datamodules of the list"
        raise ValueError(msg)
    names = list(categories) if categories else [module.category or module.name for module in datamodules]
    if not names or len(set(names)) != len(names) or len(names) != len(datamodules):
        msg = f"a list of {len(datamodules)} datamodules needs as many different category names, got {names}"
        raise ValueError(msg)
    return dict(zip(names, datamodules, strict=True))


def _find_class(datamodule: str | type[AnomalibDataModule]) -> type[AnomalibDataModule]:
    """Find a datamodule class by its name or import path."""
    if not isinstance(datamodule, str):
        return datamodule
    module, _, name = datamodule.rpartition(".")
    try:
        found = getattr(importlib.import_module(module) if module else anomalib.data, name, None)
    except ModuleNotFoundError:
        found = None
    if not (inspect.isclass(found) and issubclass(found, AnomalibDataModule)):
        msg = f"datamodule: anomalib has no {datamodule!r}; those with categories are {', '.join(_with_categories())}"
        raise ValueError(msg)
    return found


def _with_categories() -> list[str]:
    """List anomalib's datamodules that can be wrapped."""
    classes = (getattr(anomalib.data, name) for name in anomalib.data.__all__ if name != "MultiCategory")
    return sorted(
        cls.__name__
        for cls in classes
        if inspect.isclass(cls)
        and issubclass(cls, AnomalibDataModule)
        and (cls is Folder or "category" in inspect.signature(cls).parameters)
    )


def _create_template(cls: type[AnomalibDataModule], settings: dict[str, Any]) -> AnomalibDataModule:
    """Create the datamodule that the categories' are copies of."""
    parameters = inspect.signature(cls).parameters
    if cls is not Folder and "category" not in parameters:
        msg = f"datamodule: {cls.__name__} has no categories; those that have are {', '.join(_with_categories())}"
        raise ValueError(msg)
    unknown = [name for name in settings if name not in parameters]
    if unknown:
        msg = f"{cls.__name__} takes no {', '.join(unknown)}; it takes {', '.join(parameters)}"
        raise ValueError(msg)
    if issubclass(cls, Folder):
        if "normal_dir" not in settings or "root" not in settings:
            msg = "Folder needs root, and datamodule_args with normal_dir: the folder of normal images in each category"
            raise ValueError(msg)
        return cls(name="", **settings)
    return cls(**settings)


def _choose_categories(template: AnomalibDataModule, categories: Sequence[str] | None) -> list[str]:
    """Check the names of categories, or find all."""
    defined = _defined_categories(type(template))
    present = _present_categories(template)
    if categories is None:
        names = defined if not present or set(defined) & set(present) else present
    else:
        names = list(categories)
    valid = [*defined, *(name for name in present if name not in defined)]
    wrong = [name for name in names if name not in valid] if valid else []
    if not names or wrong or len(set(names)) != len(names):
        problem = f"no category {', '.join(map(repr, wrong))}" if wrong else f"categories must be different: {names}"
        if not names:
            problem = f"no categories found in {getattr(template, 'root', None)}"
        msg = f"{type(template).__name__}: {problem}; valid names are {', '.join(valid) or 'unknown'}"
        raise ValueError(msg)
    return names


def _defined_categories(cls: type[AnomalibDataModule]) -> list[str]:
    """List the categories that a dataset defines: CATEGORIES beside anomalib's dataset of the same name."""
    try:
        module = importlib.import_module(cls.__module__.replace(".datamodules.", ".datasets."))
    except ModuleNotFoundError:
        return []
    return list(getattr(module, "CATEGORIES", ()))


def _present_categories(template: AnomalibDataModule) -> list[str]:
    """List the folders in the root that look like a category."""
    root = getattr(template, "root", None)
    if root is None or not Path(root).is_dir():
        return []
    wanted = template.normal_dir if isinstance(template, Folder) else "train"
    inside = [wanted] if isinstance(wanted, str | Path) else list(wanted)
    return sorted(folder.name for folder in Path(root).iterdir() if any((folder / name).is_dir() for name in inside))


def _with_category(template: AnomalibDataModule, category: str) -> AnomalibDataModule:
    """Copy a datamodule that was not set up yet for another category."""
    module = copy.deepcopy(template)
    if isinstance(module, Folder):
        module.root = Path(module.root or ".") / category
        rename_datamodule(module, category)
    module.category = category
    return module
