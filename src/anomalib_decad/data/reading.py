# SPDX-License-Identifier: Apache-2.0
"""Images of more than 8 bits, and masks, from files."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import torch
from anomalib.data.utils import read_image as read_8_bit_image
from PIL import Image as PillowImage
from torchvision.tv_tensors import Image, Mask

__all__ = ["FULL_WHITE", "find_unreadable", "find_white", "is_deep", "naming", "read_image", "read_mask", "read_values"]

logger = logging.getLogger(__name__)

#: Largest values of 8, 10, 12 and 16 bits.
_WHITES = (255, 1023, 4095, 65535)

#: White where nothing is known about the other images.
FULL_WHITE = 65535.0

#: More different values than this in a mask are noise or blurred edges, and no classes of defects.
_MOST_CLASSES = 16

_clipped: set[float] = set()


def is_deep(path: str | Path) -> bool:
    """Tell from a file's header whether its values have more than 8 bits, which Pillow clips to white or cuts off.

    Args:
        path (str | Path): An image file.

    Returns:
        bool: Whether :func:`read_image` scales it by a white level.
    """
    with PillowImage.open(path) as image:
        # The tiles name the layout of the file, of which Pillow's mode RGB keeps the upper 8 bits. BGR;16 is a BMP's.
        return image.mode.startswith(("I", "F")) or re.search(r"\b(RGB|L)\w*;16", str(image.tile)) is not None


def read_values(path: str | Path) -> np.ndarray:
    """Read the values of a deep image as they are.

    Args:
        path (str | Path): An image file.

    Returns:
        np.ndarray: Shape (H, W) or (H, W, 3), RGB.

    Raises:
        OSError: If the file cannot be read, or has no finite value.
    """
    with PillowImage.open(path) as image:
        if image.mode.startswith(("I", "F")):
            numbers = np.asarray(image)
            if not np.isfinite(numbers).any():
                msg = "it has no finite value"
                raise OSError(msg)
            return numbers
    flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    # Not imread, which takes no letters outside ASCII on Windows.
    values = cv2.imdecode(np.fromfile(path, np.uint8), flags)
    if values is None:
        msg = f"{path} cannot be read: save it as PNG or TIFF of 8 or 16 bits"
        raise OSError(msg)
    return values[..., ::-1]


def find_white(paths: Iterable[str | Path]) -> tuple[float, str]:
    """Find the value of white in deep images of one product.

    Images of 10 or 12 bits are saved with 16. Their white is the largest value of as few bits (8, 10, 12, 16) as hold
    all values of these images, not of each: a dark image must stay dark. Values that are not finite do not count.

    Args:
        paths (Iterable[str | Path]): Deep images of the same product.

    Returns:
        tuple[float, str]: The value, and what to call its kind.

    Raises:
        OSError: If a file cannot be read, or all values of all are negative.
    """
    names = list(paths)
    largest = max(map(_largest, names), default=FULL_WHITE)
    if largest < 0:
        msg = f"all values of {names[0]} are negative, and 0 is black: save the images with values from 0 on"
        raise OSError(msg)
    for white in _WHITES:
        # Fractions are either between 0 and 1, or of no known kind.
        if largest <= white and (largest > 1 or largest == 0):
            return float(white), f"{white.bit_length()} bits"
    return (1.0, "fractions") if 0 < largest <= 1 else (largest, "an unknown kind")


def _largest(path: str | Path) -> float:
    with naming(path):
        values = read_values(path)
        return float(values[np.isfinite(values)].max())


def read_image(path: str | Path, white: float = FULL_WHITE) -> torch.Tensor:
    """Read an image.

    Args:
        path (str | Path): An image file. Those of 8 bits are read as anomalib does.
        white (float): The value of white in a deep image. What is brighter, or negative, is clipped, which is said. NaN
            is black.
            Defaults to ``65535``.

    Returns:
        torch.Tensor: float32 of shape (3, H, W), in [0, 1].

    Raises:
        OSError: If the file cannot be read.
    """
    with naming(path):
        if not is_deep(path):
            return cast("torch.Tensor", read_8_bit_image(path, as_tensor=True))
        values = torch.from_numpy(read_values(path).astype(np.float32)).nan_to_num()
    if values.max() > white and white not in _clipped:
        _clipped.add(white)
        logger.warning(
            "%s has values above %g, which other images of the product take for white: they are clipped. "
            "Give MultiCategory the bit_depth of the camera.",
            path,
            white,
        )
    if values.min() < 0 and 0.0 not in _clipped:
        _clipped.add(0.0)
        logger.warning("%s has negative values: they are clipped to 0, which is black.", path)
    values = (values / white).clamp(0, 1)
    values = values.permute(2, 0, 1) if values.ndim == 3 else values.expand(3, *values.shape)
    return Image(values.contiguous())


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name a file in whatever its reading raises: Pillow says that an image is truncated, but not which.

    Args:
        path (str | Path): The file.

    Yields:
        None: While it is read.

    Raises:
        OSError: If something was raised.
    """
    try:
        yield
    except Exception as error:  # Pillow's plug-ins raise of all kinds.
        msg = f"{path} cannot be read ({error}): remove or replace the file"
        raise OSError(msg) from error


def find_unreadable(paths: Iterable[str | Path], report: Callable[[float], None] = lambda _: None) -> dict[str, str]:
    """Read files whole, several at once, and find those that are no images or only a part of one.

    Args:
        paths (Iterable[str | Path]): Files.
        report (Callable[[float], None]): Is told which part has been read, in [0, 1].
            Defaults to a function that tells nobody.

    Returns:
        dict[str, str]: The reason for each file that cannot be read, by its path.
    """
    paths = list(paths)
    with ThreadPoolExecutor() as pool:
        reasons = {}
        for number, (path, reason) in enumerate(zip(paths, pool.map(_reason_against, paths), strict=True), 1):
            report(number / len(paths))
            if reason:
                reasons[str(path)] = reason
        return reasons


def _reason_against(path: str | Path) -> str | None:
    try:
        read_values(path) if is_deep(path) else read_8_bit_image(path)
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def read_mask(path: str | Path) -> torch.Tensor:
    """Read a mask of defects.

    Every value above 0 is a defect, as in anomalib. But compression and resizing leave noise: in a JPEG, and where
    there are more values than classes of defects can be, a defect is what is above half of the largest value.

    Args:
        path (str | Path): An image file.

    Returns:
        torch.Tensor: uint8 of shape (H, W), of 0 and 1.

    Raises:
        OSError: If the file cannot be read.
    """
    with naming(path), PillowImage.open(path) as image:
        is_noisy = image.format in {"JPEG", "MPO", "WEBP"}
        # Grey would round dark colours down, and a conversion to it cuts numbers that are not bytes.
        is_number = image.mode == "F" or image.mode.startswith("I")
        values = np.asarray(image if is_number else image.convert("RGB"))
    values = values.max(-1) if values.ndim == 3 else values
    if not is_noisy:
        is_noisy = len(np.unique(values)) > _MOST_CLASSES
    return Mask(torch.from_numpy(values > (values.max() / 2 if is_noisy else 0)), dtype=torch.uint8)
