# SPDX-License-Identifier: Apache-2.0
"""One look at a category's images and masks before the training."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from anomalib import TaskType
from anomalib.data import AnomalibDataset
from anomalib.data.errors import MisMatchError
from anomalib.data.utils import LabelName
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from anomalib_decad.data.dataset import mask_paths
from anomalib_decad.data.reading import image_size, is_high_bit_depth, naming, read_mask, white_level

__all__ = ["check_category"]

logger = logging.getLogger(__name__)

# Of each category: headers that are read, images of high bit depth that tell the white level, masks that are decoded.
# A look at thirty categories takes a few seconds.
_HEADERS, _WHITES, _MASKS = 24, 16, 4


def check_category(category: str, datasets: Mapping[str, AnomalibDataset], held_out: int = 0) -> float | None:
    """Look at a sample of a category's images and masks, and say in one line what is odd about them.

    Args:
        category (str): Name of the category.
        datasets (Mapping[str, AnomalibDataset]): Its datasets: ``train``, ``val``, ``test``.
        held_out (int): How many of its training images stand in for missing validation images.

    Returns:
        float | None: The value of white in its images of high bit depth, if the sample has some.

    Raises:
        MisMatchError: If an anomalous image lacks its mask, in a dataset with masks, or masks of one image differ in
            size.
        OSError: If a file cannot be read.
    """
    white, findings = None, []
    high = []
    for path in _sample(sorted({path for data in datasets.values() for path in data.samples.image_path}), _HEADERS):
        with naming(path):
            if is_high_bit_depth(path):
                high.append(path)
    if high:
        white = white_level(_sample(high, _WHITES))
        findings.append(f"images of more than 8 bits, in which {white:g} is white")
    findings += _check_subsets(datasets)
    if held_out:
        findings.append(f"no validation images, so {held_out} of its training images are held out for the thresholds")
    for dataset in datasets.values():
        if len(dataset) and dataset.task != TaskType.CLASSIFICATION:
            findings += _check_masks(dataset.samples[dataset.samples.label_index == LabelName.ABNORMAL])
    if findings:
        rank_zero_only(logger.warning)("The category %s: %s.", category, "; ".join(dict.fromkeys(findings)))
    return white


def _sample(paths: list[str], count: int) -> list[str]:
    """Take some of a list from all of its parts."""
    return [paths[index] for index in np.unique(np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int))]


def _check_subsets(datasets: Mapping[str, AnomalibDataset]) -> list[str]:
    findings, test = [], datasets.get("test")
    labels = set(test.samples.label_index) if test is not None else set()
    if not labels:
        findings.append("no test images, so there are no metrics")
    elif LabelName.UNKNOWN not in labels:
        if LabelName.NORMAL not in labels:
            findings.append("no normal test images, so there are no image metrics (test_split_mode=from_dir has them)")
        if LabelName.ABNORMAL not in labels:
            findings.append("no anomalous test images, so there are no metrics")
    if LabelName.ABNORMAL in labels and test is not None and test.task == TaskType.CLASSIFICATION:
        findings.append("no masks, so there are no pixel metrics")
    if not len(datasets.get("val", ())):
        findings.append("no validation images, so it has no part in the thresholds (see val_split_mode)")
    return findings


def _check_masks(anomalous: pd.DataFrame) -> list[str]:
    masks = {str(sample.image_path): mask_paths(sample) for _, sample in anomalous.iterrows()}
    if missing := [image for image, paths in masks.items() if not paths or not all(Path(p).is_file() for p in paths)]:
        msg = f"{len(missing)} of {len(masks)} anomalous images have no mask, the first is {missing[0]}"
        raise MisMatchError(msg)
    for paths in masks.values():
        if len(paths) > 1 and len({image_size(path) for path in paths}) > 1:
            msg = f"the masks {', '.join(map(str, paths))} are of one image, and have different sizes: make them equal"
            raise MisMatchError(msg)
    chosen = [(masks[image][0], image) for image in _sample(list(masks), _MASKS)]
    return [f"the mask {Path(mask).name} {odd}" for mask, image in chosen for odd in _check_mask(mask, image)]


def _check_mask(path: str, image: str) -> list[str]:
    with naming(path), Image.open(path) as mask:
        has_alpha, palette = "A" in mask.getbands(), mask.getpalette() if mask.mode == "P" else None
    share = float(read_mask(path).float().mean())
    odd = {
        "is of another size than its image": image_size(path) != image_size(image),
        "has an alpha channel, which may be what counts (see docs/many-products.md)": has_alpha,
        "has a palette whose first color is not black": bool(palette and any(palette[:3])),
        "of an anomalous image is empty": share == 0,
        f"covers {share:.0%} of the image": share > 0.95,
    }
    return [text for text, is_odd in odd.items() if is_odd]
