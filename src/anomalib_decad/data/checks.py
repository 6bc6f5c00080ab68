# SPDX-License-Identifier: Apache-2.0
"""One look at a category's images and masks before the training."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from anomalib import TaskType
from anomalib.data import AnomalibDataset
from anomalib.data.errors import MisMatchError
from anomalib.data.utils import LabelName
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from anomalib_decad.data.reading import find_white, is_deep, naming, read_values

__all__ = ["check_category", "look_at_subsets"]

logger = logging.getLogger(__name__)

# Of each category: headers that are read, images of more than 8 bits that find the white, images and masks that are
# decoded. A look at thirty categories takes a few seconds.
_HEADERS, _WHITES, _IMAGES, _MASKS = 24, 16, 4, 4


class _Look(NamedTuple):
    """What a look has found."""

    white: float | None
    findings: list[str]


def check_category(category: str, datasets: Mapping[str, AnomalibDataset], held_out: int = 0) -> float | None:
    """Look at a sample of a category's images and masks, and say in one line what is odd about them.

    Args:
        category (str): Name of the category.
        datasets (Mapping[str, AnomalibDataset]): Its datasets by subset: ``train``, ``val``, ``test``.
        held_out (int): How many of its training images stand in for missing validation images.
            Defaults to ``0``.

    Returns:
        float | None: The value of white in its images of more than 8 bits; ``None`` if the sample has none.

    Raises:
        MisMatchError: If an anomalous image has no mask, although the dataset is one with masks.
        OSError: If a file cannot be read.
    """
    tables = {subset: dataset.samples for subset, dataset in datasets.items()}
    every = pd.concat(tables.values(), ignore_index=True)
    white, findings = _look_at_images(every)
    findings += look_at_subsets(tables)
    if held_out:
        findings.append(f"no validation images, so {held_out} of its training images are held out for the thresholds")
    for dataset in datasets.values():
        if len(dataset) and dataset.task != TaskType.CLASSIFICATION:
            findings += _look_at_masks(dataset.samples)
    test = datasets.get("test")
    if test is not None and len(test) and test.task == TaskType.CLASSIFICATION and test.has_anomalous:
        findings.append("no masks, so there are no pixel metrics")
    if findings:
        _say(category, "; ".join(dict.fromkeys(findings)))
    return white


@rank_zero_only
def _say(category: str, findings: str) -> None:
    logger.warning("The category %s: %s.", category, findings)


def _sample(paths: list[str], count: int) -> list[str]:
    """Take some of a list from all of its parts."""
    paths = list(dict.fromkeys(paths))
    return [paths[index] for index in np.unique(np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int))]


def _look_at_images(samples: pd.DataFrame) -> _Look:
    findings = []
    paths = _sample(sorted(map(str, samples.image_path)), _HEADERS)
    deep = []
    for path in paths:
        with naming(path):
            if is_deep(path):
                deep.append(path)
    white = None
    if deep:
        white, kind = find_white(_sample(deep, _WHITES))
        findings.append(f"images of more than 8 bits, in which {white:g} is white, as their values fit {kind}")
        if kind == "an unknown kind":
            findings[-1] += " (save them with 16 bits, or give MultiCategory their bit_depth)"
        if len(deep) < len(paths):
            findings.append("images of 8 bits beside those of more")
    constant = [path for path in _sample(paths, _IMAGES) if _is_constant(path)]
    if constant:
        findings.append(f"{Path(constant[0]).name} has one value everywhere")
    return _Look(white, findings)


def _is_constant(path: str) -> bool:
    with naming(path):
        if is_deep(path):
            values = read_values(path)
        else:
            with Image.open(path) as image:
                values = np.asarray(image.convert("RGB"))
    return bool((values == values[:1, :1]).all())


def look_at_subsets(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Say which kinds of images are missing in the test and validation set.

    Args:
        tables (Mapping[str, pd.DataFrame]): anomalib's tables of samples by subset: ``test``, ``val``.

    Returns:
        list[str]: What is missing, and what that means.
    """
    findings = []
    test, val = tables.get("test"), tables.get("val")
    labels = set() if test is None else set(test.label_index)
    if test is None or test.empty:
        findings.append("no test images, so there are no metrics")
    elif LabelName.UNKNOWN not in labels:
        if LabelName.NORMAL not in labels:
            findings.append("no normal test images, so there are no image metrics (test_split_mode=from_dir has them)")
        if LabelName.ABNORMAL not in labels:
            findings.append("no anomalous test images, so there are no metrics")
    if val is None or val.empty:
        findings.append("no validation images, so it has no part in the thresholds (see val_split_mode)")
    return findings


def _size_of(path: str | Path) -> tuple[int, int]:
    with naming(path), Image.open(path) as image:
        return image.size


def _look_at_masks(samples: pd.DataFrame) -> list[str]:
    anomalous = samples[samples.label_index == LabelName.ABNORMAL]
    masks = [value if isinstance(value, list) else [value] for value in anomalous.mask_path]
    missing = [
        image
        for image, paths in zip(anomalous.image_path, masks, strict=True)
        if not all(isinstance(path, str | Path) and Path(path).is_file() for path in paths)
    ]
    if missing:
        msg = f"{len(missing)} of {len(anomalous)} anomalous images have no mask, the first is {missing[0]}"
        raise MisMatchError(msg)
    for paths in masks:
        if len(paths) > 1 and len({_size_of(path) for path in paths}) > 1:
            msg = f"the masks {', '.join(map(str, paths))} are of one image, and have different sizes: make them equal"
            raise MisMatchError(msg)
    findings = []
    pairs = {str(paths[0]): str(image) for image, paths in zip(anomalous.image_path, masks, strict=True)}
    for path in _sample(list(pairs), _MASKS):
        name = Path(path).name
        with naming(path), Image.open(path) as mask, Image.open(pairs[path]) as image:
            values = np.unique(np.asarray(mask.convert("L")))
            if mask.size != image.size:
                findings.append(f"the mask {name} is of another size than its image")
        if len(values) > 2:
            findings.append(f"the mask {name} has {len(values)} values, not two: save masks as PNG with 0 and 255")
        elif not values.any():
            findings.append(f"the mask {name} of an anomalous image is empty")
    return findings
