# SPDX-License-Identifier: Apache-2.0
"""Many categories of a dataset in one anomalib datamodule."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.errors import MisMatchError
from anomalib.data.utils import TestSplitMode, ValSplitMode
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler
from torchvision.transforms.v2 import Transform

from anomalib_decad.compat import update_augmentations
from anomalib_decad.data.categories import create_datamodules
from anomalib_decad.data.checks import check_category
from anomalib_decad.data.dataset import CategoryDataset
from anomalib_decad.data.layouts import check_folders, list_by_name
from anomalib_decad.data.sampling import CategoryBatchSampler, ResumableDataLoader
from anomalib_decad.ranges import check_range

__all__ = ["MultiCategory"]

logger = logging.getLogger(__name__)

_NAMED_ERRORS = (FileNotFoundError, ValueError, MisMatchError)

_SUBSETS = ("train", "val", "test")

# Processes that read images, where there are as many cores.
_MOST_WORKERS = 8

# Training images that stand in for missing validation images: every tenth, but at least and at most so many. Of fewer
# than four times the least it is a quarter.
_EVERY, _LEAST, _MOST = 10, 6, 64


class MultiCategory(AnomalibDataModule):
    """Several categories of a dataset at once: one model is trained on all of them and tested on each.

    It joins the images of one datamodule for each category. Downloads and splits are theirs. Each batch has a field
    ``category``. It works with every anomalib model.

    Args:
        datamodule (str | type[AnomalibDataModule] | AnomalibDataModule | Sequence[AnomalibDataModule]): Name or class
            of one of anomalib's datamodules with categories, or ``Folder``, whose categories are the folders in
            ``root``; an instance, whose settings then hold for every category; or a list of one for each category.
        categories (Sequence[str | int] | None): Names of the categories; a number finds the name that reads so.
            Defaults to ``None``: all in ``root``, or, if it is empty, all that the dataset defines.
        root (Path | str | None): Folder with a folder for each category. The dataset is downloaded into an empty one.
            Defaults to ``None``: that of the wrapped datamodule.
        sampling (Literal["auto", "natural", "balanced"]): Each training image once in an epoch (natural), or every
            category equally often, with replacement (balanced).
            Defaults to ``"auto"``: balanced, but natural in a training of one epoch, as of memory banks.
        train_batch_size (int): Images in a training batch.
        eval_batch_size (int): Images in a validation, test or prediction batch.
        num_workers (int | None): Processes that read images.
            Defaults to ``None``: one for each core, at most 8.
        train_augmentations (Transform | None): Augmentations of training images.
        val_augmentations (Transform | None): Augmentations of validation images.
        test_augmentations (Transform | None): Augmentations of test images.
        augmentations (Transform | None): Augmentations of images whose stage has none of its own.
        test_split_mode (TestSplitMode | str | None): Where test images come from.
            Defaults to ``None``: as the wrapped datamodule has it. So with the three that follow.
        test_split_ratio (float | None): Share of images for the test set.
        val_split_mode (ValSplitMode | str | None): Where validation images come from. Where there are none, every tenth
            training image is held out, but not with ``"none"``.
        val_split_ratio (float | None): Share of images for the validation set.
        seed (int | None): Seed of random splits.
        datamodule_args (Mapping[str, Any] | None): Further arguments of the wrapped datamodule, such as
            ``{"normal_dir": "good", "abnormal_dir": "bad"}`` of ``Folder``.
        bit_depth (int | None): Bits of the values in image files that have more than 8.
            Defaults to ``None``: for each category the fewest of 8, 10, 12 and 16 that hold its largest value.

    Raises:
        ValueError: If a name or an argument is wrong; the message lists the valid ones.

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
        splits: dict[str, Any] = {
            "test_split_mode": test_split_mode, "test_split_ratio": test_split_ratio,
            "val_split_mode": val_split_mode, "val_split_ratio": val_split_ratio, "seed": seed,
        }  # fmt: skip
        # A container may have fewer cores than its machine.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, _MOST_WORKERS) if num_workers is None else num_workers
        transforms = train_augmentations, val_augmentations, test_augmentations, augmentations
        super().__init__(train_batch_size, eval_batch_size, workers, *transforms, **splits)
        is_sampling = sampling in {"auto", "natural", "balanced"}
        check_range(is_sampling, "sampling", "'auto', 'natural' or 'balanced'", repr(sampling))
        check_range(train_batch_size >= 1, "train_batch_size", "at least 1", train_batch_size)
        check_range(eval_batch_size >= 1, "eval_batch_size", "at least 1", eval_batch_size)
        check_range((num_workers or 0) >= 0, "num_workers", "at least 0", num_workers)
        check_range(bit_depth is None or 8 <= bit_depth <= 32, "bit_depth", "between 8 and 32", bit_depth)
        self.sampling, self.bit_depth = sampling, bit_depth
        self._given_val_split_mode = val_split_mode
        settings = {"root": root, **splits, **(datamodule_args or {})}
        settings = {name: value for name, value in settings.items() if value is not None}
        self.datamodules = create_datamodules(datamodule, categories, settings)
        check_folders(self.datamodules.values())
        #: The value of white in each category's images of high bit depth.
        self.white_levels: dict[str, float] = {}
        self._loader_state: dict[str, Any] = {}
        self._are_set_up = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the dataset: that of the folder which holds the categories."""
        roots = [Path(getattr(module, "root", None) or ".").resolve() for module in self.datamodules.values()]
        folder = roots[0] if len(set(roots)) == 1 else roots[0].parent
        return folder.name or type(self).__name__

    @property
    def categories(self) -> list[str]:
        """Names of the categories."""
        return list(self.datamodules)

    def prepare_data(self) -> None:
        """Download what is missing, as the wrapped datamodules do it."""
        for module in self.datamodules.values():
            module.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up the datasets of all categories, once, and join them; ``stage`` is unused, as in anomalib."""
        if not self._are_set_up:
            self._setup(stage)
            self._are_set_up = True
        update_augmentations(self)

    def _setup(self, _stage: str | None = None) -> None:
        joined: dict[str, dict[str, AnomalibDataset]] = {subset: {} for subset in _SUBSETS}
        for category, module in self.datamodules.items():
            try:
                datasets = self._set_up_category(category, module)
            except (OSError, RuntimeError, ValueError, MisMatchError) as error:
                msg = f"the category {category!r} cannot be read: {error}"
                raise (type(error) if type(error) in _NAMED_ERRORS else RuntimeError)(msg) from error
            for subset, dataset in datasets.items():
                joined[subset][category] = dataset
        if self.bit_depth is not None:
            self.white_levels = dict.fromkeys(self.datamodules, 2.0**self.bit_depth - 1)
        for subset, datasets in joined.items():
            if datasets:
                setattr(self, f"{subset}_data", CategoryDataset(datasets, self.white_levels))
        sizes = [
            f"{sum(map(len, datasets.values()))} {subset} images" for subset, datasets in joined.items() if datasets
        ]
        logger.info("%s: %s", self.name, ", ".join(sizes))

    def _set_up_category(self, category: str, module: AnomalibDataModule) -> dict[str, AnomalibDataset]:
        """Set up the datamodule of a category, and give its datasets by subset."""
        module.num_workers = 0  # its loaders read nothing: only their datasets are wanted
        list_by_name(module)
        # anomalib takes a validation set that is a part of the test set away together with that.
        wants_none = module.val_split_mode == ValSplitMode.NONE and module.test_split_mode != TestSplitMode.NONE
        if self._given_val_split_mode is not None:
            wants_none = self._given_val_split_mode == ValSplitMode.NONE
        module.setup()
        datasets = {
            # The loader's dataset, because a datamodule may choose between several (MVTecAD2's test_type).
            subset: getattr(module, f"{subset}_dataloader")().dataset
            for subset in _SUBSETS
            if hasattr(module, f"{subset}_data")
        }
        white = check_category(category, datasets, 0 if wants_none else _hold_out(datasets))
        if white is not None:
            self.white_levels[category] = white
        return datasets

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        """Create the training dataloader, with the chosen sampling."""
        is_balanced = self.sampling == "balanced"
        if self.sampling == "auto" and self.trainer is not None:
            is_balanced = self.trainer.max_epochs != 1
        category = self.train_data.samples["category"]
        weights = (1 / category.map(category.value_counts())).tolist()
        loader = ResumableDataLoader(
            dataset=self.train_data,
            sampler=WeightedRandomSampler(weights, len(weights)) if is_balanced else RandomSampler(weights),
            batch_size=self.train_batch_size,
            num_workers=self.num_workers,
            collate_fn=self.external_collate_fn or self.train_data.collate_fn,
        )
        loader.load_state_dict(self._loader_state)
        self._loader_state = {}
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Give the images that are left of an epoch."""
        # Lightning loads the state of a loader itself, but not if the model has asked for estimated_stepping_batches.
        loader = getattr(self.trainer, "train_dataloader", None)
        return {"train_dataloader": loader.state_dict()} if isinstance(loader, ResumableDataLoader) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the images that are left of an epoch, for a training that goes on."""
        if self.trainer is not None and self.trainer.training:
            self._loader_state = state_dict.get("train_dataloader", {})

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Create the validation dataloader; nothing where there are no validation images, so that training goes on."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Create the test dataloader; nothing where there are no test images."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, subset: str) -> EVAL_DATALOADERS:
        dataset: CategoryDataset | None = getattr(self, f"{subset}_data", None)
        if not dataset:
            return []
        categories = dataset.samples["category"].tolist() if dataset.differs_in_masks else ()
        return DataLoader(
            dataset=dataset,
            batch_sampler=CategoryBatchSampler(SequentialSampler(dataset), self.eval_batch_size, categories=categories),
            num_workers=self.num_workers,
            collate_fn=self.external_collate_fn or dataset.collate_fn,
        )


def _hold_out(datasets: dict[str, AnomalibDataset]) -> int:
    """Take validation images from a category's training images if it has none, and give their number."""
    train = datasets["train"]
    if len(datasets.get("val", ())) or len(train) < 2:
        return 0
    count = min(max(len(train) // _EVERY, min(_LEAST, len(train) // 4), 1), _MOST)
    chosen = [number * len(train) // count for number in range(count)]
    kept = [index for index in range(len(train)) if index not in set(chosen)]
    datasets["train"], datasets["val"] = train.subsample(kept), train.subsample(chosen)
    return count
