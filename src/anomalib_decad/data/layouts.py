# SPDX-License-Identifier: Apache-2.0
"""The images of a category and their masks, in the layouts whose masks anomalib pairs by sort order."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import pandas as pd
from anomalib import TaskType
from anomalib.data import MPDD, AnomalibDataModule, AnomalibDataset, AutoVI, BTech, Folder, MVTecAD, MVTecLOCO, Visa
from anomalib.data.errors import MisMatchError
from anomalib.data.utils import LabelName, TestSplitMode, ValSplitMode
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_decad.compat import replace_setup
from anomalib_decad.data.reading import other_images

__all__ = ["check_folders", "list_by_name", "pair_by_name"]

logger = logging.getLogger(__name__)

#: Datamodules with the layout of MVTec AD, and how each calls its normal images.
_NORMAL = {MVTecAD: "good", MVTecLOCO: "good", Visa: "good", MPDD: "good", AutoVI: "good", BTech: "ok"}

_FOLDERS = ("normal_dir", "normal_test_dir", "abnormal_dir", "mask_dir")

_Key = tuple[str, str]  # folder and stem of an image or a mask
_Mask = TypeVar("_Mask")


class _Image(NamedTuple):
    path: Path
    split: str
    label: str
    key: _Key | None = None  # of an anomalous image


class ListedDataset(AnomalibDataset):
    """Images that have been listed already, in a table as anomalib's; ``mask_path`` may be a list of paths."""

    def __init__(self, samples: pd.DataFrame, category: str) -> None:
        super().__init__()
        self.samples, self.category = samples, category


def list_by_name(datamodule: AnomalibDataModule) -> None:
    """Have a datamodule that was not set up yet find masks by the names of their images.

    anomalib pairs them by their order, which is wrong for ``1.png``, ``10.png`` and ``1_mask.png``, ``10_mask.png``.
    Datamodules of other layouts, and of users' own classes, stay as they are.
    """
    if type(datamodule) is Folder or type(datamodule) in _NORMAL:
        replace_setup(datamodule, partial(_set_up, datamodule))


def _set_up(datamodule: AnomalibDataModule, _stage: str | None = None) -> None:
    if isinstance(datamodule, Folder):
        samples = _list_folders(datamodule)
    else:
        root = datamodule.split_root if isinstance(datamodule, Visa) else datamodule.root  # type: ignore[attr-defined]
        samples = _list_mvtec((Path(root) / datamodule.category).resolve(), _NORMAL[type(datamodule)])
    for subset in ("train", "val", "test") if isinstance(datamodule, MVTecLOCO) else ("train", "test"):
        # The attributes, of which the task is one, stay with the table.
        part = samples[samples.split == subset].reset_index(drop=True)
        setattr(datamodule, f"{subset}_data", ListedDataset(part, datamodule.category))
    counts = Counter(samples.split)
    num_test = counts["test"] or int(counts["train"] * (datamodule.test_split_ratio or 0))
    if datamodule.test_split_mode == TestSplitMode.NONE:  # anomalib drops the normal ones
        num_test = int((samples.label_index[samples.split == "test"] == LabelName.ABNORMAL).sum())
    if datamodule.val_split_mode == ValSplitMode.FROM_TEST and not num_test:  # anomalib cannot split nothing
        datamodule.val_split_mode = ValSplitMode.NONE


def _list_mvtec(root: Path, normal: str) -> pd.DataFrame:
    """List ``split/label/image`` with the masks ``ground_truth/label/image`` or ``ground_truth/label/image/any``."""
    images = []
    for folder, split in (("train", "train"), ("validation", "val"), ("test", "test")):
        for file in _images_in(root, f"{folder}/*/*"):
            label = file.parent.name
            images.append(_Image(file, split, label, (label, file.stem) if label != normal else None))
    masks: dict[_Key, list[Path]] = {}
    for mask in _images_in(root, "ground_truth/*/*"):
        masks.setdefault((mask.parent.name, mask.stem), []).append(mask)
    for mask in _images_in(root, "ground_truth/*/*/*"):
        masks.setdefault((mask.parents[1].name, mask.parent.name), []).append(mask)
    return _make_table(root, images, masks, "ground_truth/{0.parent.name}/{0.stem}_mask.png")


def _list_folders(datamodule: Folder) -> pd.DataFrame:
    """List the folders of a :class:`Folder`. A product may have no defects."""
    named = {name: _named(datamodule, name) for name in _FOLDERS}
    every = set(itertools.chain(*named.values()))
    if len(every) < sum(map(len, named.values())):
        msg = f"two of {', '.join(_FOLDERS)} are the same folder: its images can only be one of both"
        raise ValueError(msg)
    extensions = tuple(extension.lower() for extension in datamodule.extensions or IMG_EXTENSIONS)

    def images_of(folder: Path) -> list[Path]:
        """List the images of a folder. Of folders in one another the innermost has an image."""
        inner = {other for other in every if folder in other.parents}
        return [file for file in _images_in(folder, "**/*", extensions) if inner.isdisjoint(file.parents)]

    images = [_Image(file, "train", "normal") for folder in named["normal_dir"] for file in images_of(folder)]
    images += [_Image(file, "test", "normal_test") for folder in named["normal_test_dir"] for file in images_of(folder)]
    # Folders of masks go with those of defects in their order, or one has all.
    is_in_order = len(named["abnormal_dir"]) == len(named["mask_dir"])
    for index, folder in enumerate(named["abnormal_dir"]):
        start = Path(str(index) if is_in_order else folder.name)
        for file in images_of(folder):
            images.append(_Image(file, "test", "abnormal", (str(start / file.parent.relative_to(folder)), file.stem)))
    masks: dict[_Key, list[Path]] = {}
    for index, folder in enumerate(named["mask_dir"]):
        start = Path(str(index) if is_in_order else ".")
        for file in images_of(folder):
            masks.setdefault((str(start / file.parent.relative_to(folder)), file.stem), []).append(file)
    remedy = f"{named['mask_dir'][0]}/{{0.stem}}.png" if named["mask_dir"] else None
    return _make_table(Path(datamodule.root or ".").resolve(), images, masks, remedy, anywhere=True)


def check_folders(datamodules: Iterable[AnomalibDataModule]) -> None:
    """Raise FileNotFoundError for an argument of :class:`Folder` that names no folder of any product."""
    folders = [module for module in datamodules if isinstance(module, Folder)]
    for name in _FOLDERS:
        wanted = [folder for module in folders for folder in _named(module, name)]
        if wanted and not any(folder.is_dir() for folder in wanted):
            msg = f"{name}: there is no folder {wanted[0]}" + (", nor in any other product" if len(wanted) > 1 else "")
            raise FileNotFoundError(msg)


def _named(datamodule: Folder, name: str) -> list[Path]:
    wanted = getattr(datamodule, name)
    folders = [wanted] if isinstance(wanted, str | Path) else wanted or []
    return [(Path(datamodule.root or ".").resolve() / folder).resolve() for folder in folders]


def _images_in(root: Path, pattern: str, extensions: Sequence[str] = IMG_EXTENSIONS) -> list[Path]:
    files = [file for file in root.glob(pattern) if file.name[0] != "." and file.is_file()]
    if others := other_images(files, extensions):
        logger.warning("%s: %d images are not used, as their format is none of %s, the first is %s.", root, len(others),
                       " ".join(extensions), others[0])  # fmt: skip
    return sorted(file for file in files if file.suffix.lower() in extensions)


def _make_table(
    root: Path, images: list[_Image], masks: Mapping[_Key, list[Path]], remedy: str | None, anywhere: bool = False
) -> pd.DataFrame:
    """Make anomalib's table of samples; ``remedy`` says where the mask of an image is expected, if there can be any."""
    if not any(image.split == "train" for image in images):
        msg = f"found 0 training images in {root}"
        raise RuntimeError(msg)
    wanted = {image.path: image.key for image in images if image.key and image.split == "test"}
    found = pair_by_name(list(wanted.values()), masks, anywhere)
    pairs = {path: mask for path, mask in zip(wanted, found, strict=True) if mask}
    missing = [path for path in wanted if path not in pairs]
    if masks and missing:
        text = f"{len(missing)} of {len(wanted)} anomalous images have no mask, the first is {missing[0]}"
        msg = f"{text}: its mask is expected as {remedy.format(missing[0]) if remedy else ''}"
        raise MisMatchError(msg)
    if idle := set(itertools.chain(*masks.values())) - set(itertools.chain(*pairs.values())):
        logger.warning("%s: %d masks have no image, the first is %s.", root, len(idle), min(idle))
    rows = []
    for path, split, label, key in images:
        names = [str(mask) for mask in pairs.get(path, [])]
        index = int(LabelName.ABNORMAL if key else LabelName.NORMAL)
        rows.append((str(path), label, index, names if len(names) > 1 else "".join(names), split))
    table = pd.DataFrame(rows, columns=["image_path", "label", "label_index", "mask_path", "split"])
    # Normal images have an empty mask, so where nothing is anomalous masks are known, too.
    has_masks = remedy is not None and (bool(pairs) or not wanted)
    table.attrs["task"] = (TaskType.SEGMENTATION if has_masks else TaskType.CLASSIFICATION).value
    return table


def pair_by_name(images: Sequence[_Key], masks: Mapping[_Key, _Mask], anywhere: bool = False) -> list[_Mask | None]:
    """Find the mask of each image; images and masks are named by their folder and stem.

    A mask has the stem of its image, or the stem and ``_mask``. Another text before or after the stem (``mask-003``,
    ``003_gt``) will do if all masks of the folder have it. With ``anywhere`` it may be in any folder if no other mask
    has its name.

    Example:
        >>> pair_by_name([("hole", "1"), ("hole", "10")], {("hole", "10_mask"): "b", ("hole", "1_mask"): "a"})
        ['a', 'b']
    """
    found: dict[_Key, _Mask | None] = {}
    for folder in dict.fromkeys(folder for folder, _ in images):
        stems = [stem for own, stem in images if own == folder]
        here = {stem: mask for (own, stem), mask in masks.items() if own == folder}
        found |= {(folder, stem): mask for stem, mask in _pair_folder(stems, here).items()}
    if anywhere and None in found.values():
        images_of = Counter(stem for _, stem in images)
        masks_of = Counter(stem for _, stem in masks)
        paired = _pair_folder(list(images_of), {stem: mask for (_, stem), mask in masks.items() if masks_of[stem] == 1})
        found |= {key: paired[key[1]] for key, mask in found.items() if mask is None and images_of[key[1]] == 1}
    return [found[key] for key in images]


def _pair_folder(stems: Sequence[str], masks: Mapping[str, _Mask]) -> dict[str, _Mask | None]:
    """Find the masks of one folder's images: by the first naming that all agree with, or as many as there are."""
    for before, after in _namings(stems, masks):
        found = {stem: masks.get(f"{before}{stem}{after}") for stem in stems}
        if None not in found.values():
            return found
    return {stem: masks.get(f"{stem}_mask", masks.get(stem)) for stem in stems}


def _namings(stems: Sequence[str], masks: Mapping[str, _Mask]) -> Iterator[tuple[str, str]]:
    """Give what may stand before and after an image's stem in the name of its mask."""
    yield "", "_mask"
    yield "", ""
    # The longest is in the fewest names of masks.
    longest = max(stems, key=len, default="")
    for mask in masks:
        for start in range(len(mask) - len(longest) + 1):
            if mask.startswith(longest, start):
                yield mask[:start], mask[start + len(longest) :]
