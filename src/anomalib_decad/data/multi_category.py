# SPDX-License-Identifier: Apache-2.0
"""Many categories of a dataset in one anomalib datamodule."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.errors import MisMatchError
from anomalib.data.utils import TestSplitMode, ValSplitMode
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from torch.utils.data import DataLoader, SequentialSampler, WeightedRandomSampler
from torchvision.transforms.v2 import Transform

from anomalib_decad.compat import update_augmentations
from anomalib_decad.data.categories import create_datamodules, describe_download, is_without_images
from anomalib_decad.data.category_batch_sampler import CategoryBatchSampler
from anomalib_decad.data.category_dataset import CategoryDataset
from anomalib_decad.data.checks import check_category
from anomalib_decad.data.hold_out import hold_out
from anomalib_decad.data.layouts import check_folders, list_by_name
from anomalib_decad.ranges import check_range

__all__ = ["MultiCategory"]

logger = logging.getLogger(__name__)

_NAMED_ERRORS = (FileNotFoundError, ValueError, MisMatchError)

#: Processes that read images, where there are as many cores.
_MOST_WORKERS = 8

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
        categories (Sequence[str | int] | None): Names of the categories, which must be in ``root``. A number finds the
            name that reads so.
            Defaults to ``None``: all in ``root``, or, if it has nothing in it, all that the dataset defines.
        root (Path | str | None): Folder of the dataset, with a folder for each category. If it exists and is empty,
            the dataset is downloaded into it, where anomalib can.
            Defaults to ``None``: that of the wrapped datamodule, which need not exist yet.
        sampling (Literal["auto", "natural", "balanced"]): How training images are drawn: each once in an epoch
            (natural), or from every category equally often, with replacement (balanced).
            Defaults to ``"auto"``: balanced, but natural where a training is a single epoch, as that of memory banks:
            with replacement, it would miss images.
        train_batch_size (int): Images in a training batch.
            Defaults to ``16``.
        eval_batch_size (int): Images in a validation, test or prediction batch.
            Defaults to ``32``.
        num_workers (int | None): Processes that read images.
            Defaults to ``None``: one for each core, at most 8.
        train_augmentations (Transform | None): Augmentations of training images.
        val_augmentations (Transform | None): Augmentations of validation images.
        test_augmentations (Transform | None): Augmentations of test images.
        augmentations (Transform | None): Augmentations of images whose stage has none of its own.
        test_split_mode (TestSplitMode | str | None): Where test images come from.
            Defaults to ``None``: as the wrapped datamodule has it. So with the three that follow.
        test_split_ratio (float | None): Share of images for the test set.
        val_split_mode (ValSplitMode | str | None): Where validation images come from. Without any, every tenth training
            image of a category is held out as one, but not with ``"none"``.
        val_split_ratio (float | None): Share of images for the validation set.
        seed (int | None): Seed of random splits.
        datamodule_args (Mapping[str, Any] | None): Further arguments of the wrapped datamodule, for example
            ``{"resolution": 512}`` for RealIAD or ``{"normal_dir": "good", "abnormal_dir": "bad"}`` for Folder.
        bit_depth (int | None): Bits of the values in image files that have more than 8.
            Defaults to ``None``: for each category the fewest of 8, 10, 12 and 16 that hold its largest value.

    Raises:
        ValueError: If the datamodule has no categories, ``root`` does not exist, or a name or an argument is wrong; the
            message lists the valid ones.

    Example:
        >>> datamodule = MultiCategory("MVTecAD", categories=["bottle", "grid"], root="./datasets/MVTecAD")
        >>> datamodule.setup()  # doctest: +SKIP
        >>> next(iter(datamodule.train_dataloader())).category[:3]  # doctest: +SKIP
        ['grid', 'bottle', 'grid']
    """

    def __init__(
        self,
        datamodule: str | type[AnomalibDataModule] | AnomalibDataModule | Sequence[AnomalibDataModule],
        categories: Sequence[str | int] | None = None,
        root: Path | str | None = None,
        sampling: Literal["auto", "natural", "balanced"] = "auto",
        train_batch_size: int = 16,
        eval_batch_size: int = 32,
        num_workers: int | None = None,
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
        bit_depth: int | None = None,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=min(_num_cores(), _MOST_WORKERS) if num_workers is None else num_workers,
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
        ways = "'auto', 'natural' or 'balanced'"
        check_range(sampling in {"auto", "natural", "balanced"}, "sampling", ways, repr(sampling))
        check_range(train_batch_size >= 1, "train_batch_size", "at least 1", train_batch_size)
        check_range(eval_batch_size >= 1, "eval_batch_size", "at least 1", eval_batch_size)
        check_range((num_workers or 0) >= 0, "num_workers", "at least 0", num_workers)
        check_range(bit_depth is None or 8 <= bit_depth <= 32, "bit_depth", "between 8 and 32", bit_depth)
        self.sampling = sampling
        self.bit_depth = bit_depth
        self._given_val_split_mode = val_split_mode
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
        self.datamodules = create_datamodules(datamodule, categories, settings)
        check_folders(list(self.datamodules.values()))
        self.whites: dict[str, float] = {}
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
        """Download what is missing, as the wrapped datamodules do it, and say what that is before."""
        missing = [module for module in self.datamodules.values() if is_without_images(module)]
        for download in dict.fromkeys(map(describe_download, missing)):
            if download:
                logger.warning("%s.", download)
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
        joined: dict[str, dict[str, AnomalibDataset]] = {subset: {} for subset in _SUBSETS}
        for category, module in self.datamodules.items():
            module.num_workers = 0  # its loaders read nothing: only their datasets are wanted
            list_by_name(module)
            # Where there is nothing to split, the module has no validation after its setup, either.
            wants_no_validation = self._wants_no_validation(module)
            try:
                module.setup(_stage)
                datasets = {
                    # The loader's dataset, because a datamodule may choose between several (MVTecAD2's test_type).
                    subset: getattr(module, f"{subset}_dataloader")().dataset
                    for subset in _SUBSETS
                    if hasattr(module, f"{subset}_data")
                }
                held_out = 0 if wants_no_validation else hold_out(datasets)
                white = check_category(category, datasets, held_out)
            except (OSError, RuntimeError, ValueError, MisMatchError) as error:
                msg = f"the category {category!r} cannot be read: {error}"
                if "non-printable" in str(error):
                    msg += ": rename the folders so that their names have ASCII letters only"
                raise (type(error) if type(error) in _NAMED_ERRORS else RuntimeError)(msg) from error
            for subset, dataset in datasets.items():
                joined[subset][category] = dataset
            if white is not None:
                self.whites[category] = white
        if self.bit_depth is not None:
            self.whites = dict.fromkeys(self.datamodules, 2.0**self.bit_depth - 1)
        for subset, by_category in joined.items():
            if by_category:
                setattr(self, f"{subset}_data", CategoryDataset(by_category, self.whites))
        # anomalib writes heatmaps to the part of an image's path behind this name. Where links lead out of the folder
        # of that name, equally named images of two categories would overwrite each other.
        subsets = [getattr(self, f"{subset}_data") for subset in _SUBSETS if hasattr(self, f"{subset}_data")]
        paths = [Path(path) for subset in subsets for path in subset.samples.image_path]
        if not all(self._name in path.parts for path in paths):
            self._name = _common_folder(paths).name or self._name
        logger.info(
            "%s: %s",
            self.name,
            ", ".join(
                f"{len(getattr(self, f'{subset}_data'))} {subset} images"
                for subset in _SUBSETS
                if hasattr(self, f"{subset}_data")
            ),
        )

    def _wants_no_validation(self, module: AnomalibDataModule) -> bool:
        """Tell whether it is the user who wants no validation images."""
        if self._given_val_split_mode is not None:
            return self._given_val_split_mode == ValSplitMode.NONE
        # anomalib takes a validation set that is a part of the test set away together with that.
        return module.val_split_mode == ValSplitMode.NONE and module.test_split_mode != TestSplitMode.NONE

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

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Create the validation dataloader; nothing where there are no validation images, so that training goes on."""
        return self._evaluation_loader("val", super().val_dataloader)

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Create the test dataloader; nothing where there are no test images."""
        return self._evaluation_loader("test", super().test_dataloader)

    def _evaluation_loader(self, subset: str, create: Callable[[], EVAL_DATALOADERS]) -> EVAL_DATALOADERS:
        dataset: CategoryDataset | None = getattr(self, f"{subset}_data", None)
        if not dataset:
            return []
        if not dataset.differs_in_masks:
            return create()
        categories = dataset.samples["category"].tolist()
        return DataLoader(
            dataset=dataset,
            batch_sampler=CategoryBatchSampler(SequentialSampler(dataset), self.eval_batch_size, categories=categories),
            num_workers=self.num_workers,
            collate_fn=self.external_collate_fn or dataset.collate_fn,
        )


def _common_folder(paths: Sequence[Path]) -> Path:
    """Find the folder that all paths are in; the root if there is none, as on two drives."""
    try:
        return Path(os.path.commonpath([path.absolute() for path in paths]))
    except ValueError:
        return Path("/")


def _num_cores() -> int:
    """Count the cores that this process may use: a container may have fewer than its machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
