# SPDX-License-Identifier: Apache-2.0
"""The images of a category and their masks, in the layouts whose masks anomalib pairs by sort order."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from anomalib import TaskType
from anomalib.data import (
    MPDD,
    AnomalibDataModule,
    AnomalibDataset,
    AutoVI,
    BTech,
    Folder,
    MVTecAD,
    MVTecLOCO,
    Visa,
)
from anomalib.data.errors import MisMatchError
from anomalib.data.utils import LabelName, TestSplitMode, ValSplitMode
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_decad.compat import replace_setup
from anomalib_decad.data.pairing import pair_by_name

__all__ = ["ListedDataset", "check_folders", "list_by_name"]

logger = logging.getLogger(__name__)

#: Datamodules with the layout of MVTec AD, and how each calls its normal images.
_NORMAL = {MVTecAD: "good", MVTecLOCO: "good", Visa: "good", MPDD: "good", AutoVI: "good", BTech: "ok"}

_SPLITS = {"train": "train", "validation": "val", "test": "test"}


class ListedDataset(AnomalibDataset):
    """Images that have been listed already.

    Args:
        samples (pd.DataFrame): Table with the columns ``image_path``, ``mask_path`` (a path, a list of paths, or an
            empty text), ``label``, ``label_index`` and ``split``; its attribute ``task`` is anomalib's.
        category (str): Name of the category.
    """

    def __init__(self, samples: pd.DataFrame, category: str) -> None:
        super().__init__()
        self.category = category
        self.samples = samples


def list_by_name(datamodule: AnomalibDataModule) -> None:
    """Have a datamodule list its images so that masks are found by their names.

    anomalib sorts images and masks, and pairs the first with the first. That is wrong for ``1.png``, ``10.png`` and
    ``1_mask.png``, ``10_mask.png``. Datamodules of other layouts, and of users' own classes, stay as they are.

    Args:
        datamodule (AnomalibDataModule): The datamodule of one category, which was not set up yet.
    """
    if type(datamodule) is Folder:
        replace_setup(datamodule, partial(_set_up_folder, datamodule))
    elif type(datamodule) in _NORMAL:
        replace_setup(datamodule, partial(_set_up_mvtec, datamodule))


def _set_up_mvtec(datamodule: AnomalibDataModule, _stage: str | None = None) -> None:
    root = datamodule.split_root if isinstance(datamodule, Visa) else datamodule.root  # type: ignore[attr-defined]
    samples = _list_mvtec((Path(root) / datamodule.category).resolve(), _NORMAL[type(datamodule)])
    _set_datasets(datamodule, samples, ("train", "val", "test") if type(datamodule) is MVTecLOCO else ("train", "test"))


def _set_up_folder(datamodule: Folder, _stage: str | None = None) -> None:
    _set_datasets(datamodule, _list_folders(datamodule))


def _set_datasets(
    datamodule: AnomalibDataModule, samples: pd.DataFrame, subsets: Sequence[str] = ("train", "test")
) -> None:
    for subset in subsets:
        # The attributes, of which the task is one, stay with the table.
        part = samples[samples.split == subset].reset_index(drop=True)
        setattr(datamodule, f"{subset}_data", ListedDataset(part, datamodule.category))
    if datamodule.val_split_mode == ValSplitMode.FROM_TEST and not _count_test_images(datamodule, samples):
        # anomalib cannot split nothing. That there are no validation images is said when all have been set up.
        datamodule.val_split_mode = ValSplitMode.NONE


def _count_test_images(datamodule: AnomalibDataModule, samples: pd.DataFrame) -> int:
    """Count the images that anomalib's test split will have, of those that have been listed."""
    test = samples[samples.split == "test"]
    if datamodule.test_split_mode == TestSplitMode.NONE:
        return int((test.label_index == LabelName.ABNORMAL).sum())
    return len(test) or int((samples.split == "train").sum() * (datamodule.test_split_ratio or 0))


def _list_mvtec(root: Path, normal: str) -> pd.DataFrame:
    """List ``split/label/image`` with the masks ``ground_truth/label/image`` or ``ground_truth/label/image/any``."""
    files = [file for split in _SPLITS for file in _images_in(root, f"{split}/*/*")]
    labels = [file.parent.name for file in files]
    splits = [_SPLITS[file.parts[-3]] for file in files]
    anomalous = [label != normal for label in labels]
    masks: dict[tuple[str, str], list[Path]] = {}
    for mask in _images_in(root, "ground_truth/*/*"):
        masks.setdefault((mask.parent.name, mask.stem), []).append(mask)
    for mask in _images_in(root, "ground_truth/*/*/*"):
        masks.setdefault((mask.parents[1].name, mask.parent.name), []).append(mask)
    wanted = [file for file, split, bad in zip(files, splits, anomalous, strict=True) if bad and split == "test"]
    found = pair_by_name([(file.parent.name, file.stem) for file in wanted], masks)
    pairs = _check_pairs(root, wanted, found, masks, "ground_truth/{0.parent.name}/{0.stem}_mask.png")
    return _make_table(root, files, labels, splits, anomalous, pairs, can_have_masks=True)


_FOLDERS = ("normal_dir", "normal_test_dir", "abnormal_dir", "mask_dir")


def check_folders(datamodules: Sequence[AnomalibDataModule]) -> None:
    """Refuse an argument of :class:`Folder` that names no folder of any product: it is mistyped.

    One product may have no defects, and another no masks.

    Args:
        datamodules (Sequence[AnomalibDataModule]): Those of all products.

    Raises:
        FileNotFoundError: If there is one.
    """
    for name in _FOLDERS:
        wanted = [folder for module in datamodules if isinstance(module, Folder) for folder in _named(module, name)]
        if wanted and not any(folder.is_dir() for folder in wanted):
            msg = f"{name}: there is no folder {wanted[0]}" + (", nor in any other product" if len(wanted) > 1 else "")
            raise FileNotFoundError(msg)


def _named(datamodule: Folder, name: str) -> list[Path]:
    """List the folders that an argument names."""
    wanted = getattr(datamodule, name)
    folders = [wanted] if isinstance(wanted, str | Path) else wanted or []
    return [(Path(datamodule.root or ".").resolve() / folder).resolve() for folder in folders]


def _list_folders(datamodule: Folder) -> pd.DataFrame:
    """List the folders of a :class:`Folder`. A product may have no defects."""
    root = Path(datamodule.root or ".").resolve()
    inside = _images_in_folders(datamodule)
    parts = [
        (file, label, split)
        for name, label, split in (
            ("normal_dir", "normal", "train"),
            ("normal_test_dir", "normal_test", "test"),
            ("abnormal_dir", "abnormal", "test"),
        )
        for _, files in inside[name]
        for file in files
    ]
    files, labels, splits = (list(column) for column in zip(*parts, strict=True)) if parts else ([], [], [])
    anomalous = [label == "abnormal" for label in labels]
    abnormal, mask_folders = inside["abnormal_dir"], inside["mask_dir"]
    # Folders of masks go with those of defects in their order, or one has all.
    is_in_order = len(abnormal) == len(mask_folders)
    wanted, keys = [], []
    masks: dict[tuple[str, str], list[Path]] = {}
    for index, (folder, images) in enumerate(abnormal):
        for file in images:
            start = Path(str(index) if is_in_order else folder.name)
            wanted.append(file)
            keys.append((str(start / file.parent.relative_to(folder)), file.stem))
    for index, (folder, images) in enumerate(mask_folders):
        for file in images:
            start = Path(str(index) if is_in_order else ".")
            masks.setdefault((str(start / file.parent.relative_to(folder)), file.stem), []).append(file)
    found = pair_by_name(keys, masks, anywhere=True)
    remedy = f"{mask_folders[0][0]}/{{0.stem}}.png" if mask_folders else ""
    pairs = _check_pairs(root, wanted, found, masks, remedy)
    return _make_table(root, files, labels, splits, anomalous, pairs, can_have_masks=bool(mask_folders))


def _images_in_folders(datamodule: Folder) -> dict[str, list[tuple[Path, list[Path]]]]:
    """List the folders of each argument and their images. Of folders in one another the innermost has an image."""
    named: dict[str, list[Path]] = {}
    for name in _FOLDERS:
        named[name] = _named(datamodule, name)
        for folder in named[name]:
            if not folder.is_dir() and name in {"normal_dir", "normal_test_dir"}:
                msg = f"there is no folder {folder}, which {name} names"
                raise FileNotFoundError(msg)
    for first, second in itertools.combinations(_FOLDERS, 2):
        if both := set(named[first]) & set(named[second]):
            msg = f"{first} and {second} are the same folder, {both.pop()}: its images can only be one of both"
            raise ValueError(msg)
    every = {folder for folders in named.values() for folder in folders}
    extensions = tuple(extension.lower() for extension in datamodule.extensions or IMG_EXTENSIONS)

    def images_of(folder: Path) -> list[Path]:
        inner = [other for other in every if folder in other.parents]
        files = _images_in(folder, "**/*", extensions)
        return [file for file in files if not any(other in file.parents for other in inner)]

    return {name: [(folder, images_of(folder)) for folder in folders] for name, folders in named.items()}


def _images_in(root: Path, pattern: str, extensions: tuple[str, ...] = IMG_EXTENSIONS) -> list[Path]:
    named = [file for file in root.glob(pattern) if file.suffix.lower() in extensions and file.name[0] != "."]
    files = {file for file in named if file.is_file()}
    if broken := [file for file in named if file not in files and file.is_symlink() and not file.exists()]:
        logger.warning("%s: %d links lead nowhere, the first is %s.", root, len(broken), min(broken))
    return sorted(files)


def _check_pairs(
    root: Path,
    images: Sequence[Path],
    found: Sequence[list[Path] | None],
    masks: Mapping[tuple[str, str], list[Path]],
    remedy: str,
) -> dict[Path, list[Path]]:
    """Give the masks of the images, unless there are masks, but not for all images."""
    if not masks:
        return {}
    pairs = {image: mask for image, mask in zip(images, found, strict=True) if mask is not None}
    missing = [image for image in images if image not in pairs]
    if missing:
        msg = (
            f"{len(missing)} of {len(images)} anomalous images have no mask, the first is {missing[0]}: its mask is "
            f"expected as {remedy.format(missing[0])}"
        )
        raise MisMatchError(msg)
    used = {path for mask in pairs.values() for path in mask}
    idle = [path for mask in masks.values() for path in mask if path not in used]
    if idle:
        logger.warning("%s: %d masks have no image, the first is %s.", root, len(idle), idle[0])
    return pairs


def _make_table(
    root: Path,
    files: Sequence[Path],
    labels: Sequence[str],
    splits: Sequence[str],
    anomalous: Sequence[bool],
    pairs: Mapping[Path, list[Path]],
    can_have_masks: bool,
) -> pd.DataFrame:
    """Make anomalib's table of samples."""
    if "train" not in splits:
        msg = f"found 0 training images in {root}"
        raise RuntimeError(msg)
    masks = [[str(path) for path in pairs.get(file, [])] for file in files]
    table = pd.DataFrame(
        {
            "image_path": list(map(str, files)),
            "label": labels,
            "label_index": [int(LabelName.ABNORMAL if bad else LabelName.NORMAL) for bad in anomalous],
            "mask_path": pd.Series([mask if len(mask) > 1 else "".join(mask) for mask in masks], dtype=object),
            "split": splits,
        }
    )
    # Normal images have an empty mask, so where nothing is anomalous masks are known, too.
    is_known = can_have_masks and (bool(pairs) or not any(anomalous))
    table.attrs["task"] = (TaskType.SEGMENTATION if is_known else TaskType.CLASSIFICATION).value
    return table
