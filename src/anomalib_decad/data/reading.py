# SPDX-License-Identifier: Apache-2.0
"""Images and masks from files: turned by their EXIF orientation, with more than 8 bits, with alpha or a palette."""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image as PillowImage
from PIL import ImageOps
from PIL.ExifTags import Base
from torchvision.transforms.v2.functional import to_dtype, to_image
from torchvision.tv_tensors import Image, Mask

__all__ = [
    "FULL_WHITE", "image_size", "is_high_bit_depth", "is_misread_by_anomalib", "naming", "other_images", "read_image",
    "read_mask", "white_level",
]  # fmt: skip

logger = logging.getLogger(__name__)

FULL_WHITE = 65535.0  # of an image of 16 bits, where nothing is known about the other images
_MOST_CLASSES = 16  # more different values in a mask are noise or blurred edges

_warned: set[float] = set()


@contextmanager
def _open(path: str | Path) -> Iterator[PillowImage.Image]:
    # By a file object: Pillow maps some TIFFs into memory by their names, and then turns them wrongly.
    with Path(path).open("rb") as file, PillowImage.open(file) as image:
        yield image


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Raise an OSError with a file's name for whatever its reading raises: Pillow does not say which it was."""
    try:
        yield
    except Exception as error:  # Pillow's plug-ins raise of all kinds.
        msg = f"{path} cannot be read ({error}): remove or replace the file"
        raise OSError(msg) from error


def _is_high_bit_depth(image: PillowImage.Image) -> bool:
    # The tiles name the layout of the file, of which Pillow's mode RGB keeps the upper 8 bits. BGR;16 is a BMP's.
    tiles = str(getattr(image, "tile", ""))
    return image.mode.startswith(("I", "F")) or re.search(r"\b(RGB|L)\w*;16", tiles) is not None


def is_high_bit_depth(path: str | Path) -> bool:
    """Tell from a file's header whether its values have more than 8 bits."""
    with _open(path) as image:
        return _is_high_bit_depth(image)


def is_misread_by_anomalib(path: str | Path) -> bool:
    """Tell whether anomalib clips the values of an image, or does not turn it by its EXIF orientation."""
    with _open(path) as image:
        return _is_high_bit_depth(image) or image.getexif().get(Base.Orientation, 1) in range(2, 9)


def image_size(path: str | Path) -> tuple[int, int]:
    """Give the width and height of an image, as :func:`read_image` reads it; OSError if that fails."""
    with naming(path), _open(path) as image:
        tags = getattr(image, "tag_v2", None)  # a TIFF's own size; some versions of Pillow have turned it already
        width, height = (tags[256], tags[257]) if tags else image.size
        return (height, width) if image.getexif().get(Base.Orientation) in {5, 6, 7, 8} else (width, height)


def other_images(files: Iterable[Path], extensions: Iterable[str]) -> list[Path]:
    """Find the files that Pillow can read by their names, but that have none of the extensions."""
    known = {name for name, kind in PillowImage.registered_extensions().items() if kind in PillowImage.OPEN}
    return sorted(file for file in files if file.suffix.lower() in known - set(extensions) and file.is_file())


def _read_values(path: str | Path) -> np.ndarray:
    """Read an image as it is, turned by its EXIF orientation: uint8 of shape (H, W, 3), RGB.

    Of a high bit depth it is of another type, and of shape (H, W) or (H, W, 3).
    """
    with _open(path) as image:
        is_high = _is_high_bit_depth(image)
        if not is_high or image.mode.startswith(("I", "F")):
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(image if is_high else image.convert("RGB"))
    # Not imread, which takes no letters outside ASCII on Windows.
    colors = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
    if colors is None:
        msg = "save it as PNG or TIFF of 8 or 16 bits"
        raise OSError(msg)
    return colors[..., ::-1]


def white_level(paths: Iterable[str | Path]) -> float:
    """Find the value of white in images of high bit depth of one product; OSError if a file cannot be read.

    Images of 10 or 12 bits are saved with 16. White is the largest value of as few bits (8, 10, 12, 16) as hold all
    values of these images, not of each: a dark image must stay dark. It is 1 if all values are at most 1, and the
    largest value if that has more than 16 bits.
    """
    largest = 0.0
    for path in paths:
        with naming(path):
            values = _read_values(path)
            largest = max(largest, float(values[np.isfinite(values)].max()))
    levels = (1, 255, 1023, 4095, FULL_WHITE) if largest > 0 else (255,)
    return float(next((level for level in levels if largest <= level), largest))


def read_image(path: str | Path, white_level: float = FULL_WHITE) -> torch.Tensor:
    """Read an image, turned by its EXIF orientation.

    Args:
        path (str | Path): An image file.
        white_level (float): The value of white in an image of high bit depth. What is brighter, or negative, is
            clipped, with a warning. NaN is black.
            Defaults to ``65535``.

    Returns:
        torch.Tensor: float32 of shape (3, H, W), in [0, 1].

    Raises:
        OSError: If the file cannot be read.
    """
    with naming(path):
        numbers = _read_values(path)
    if numbers.dtype == np.uint8:
        return to_dtype(to_image(numbers), torch.float32, scale=True)
    values = torch.from_numpy(numbers.astype(np.float32)).nan_to_num()
    if (values.max() > white_level or values.min() < 0) and white_level not in _warned:
        _warned.add(white_level)
        logger.warning("%s has values above %g, which is white in other images of the product, or below 0: they are "
                       "clipped. Give MultiCategory the bit_depth of the camera.", path, white_level)  # fmt: skip
    values = (values / white_level).clamp(0, 1)
    values = values.permute(2, 0, 1) if values.ndim == 3 else values.expand(3, *values.shape)
    return Image(values.contiguous())


def read_mask(path: str | Path) -> torch.Tensor:
    """Read a mask of defects, turned by its EXIF orientation: uint8 of shape (H, W), of 0 and 1.

    Every value above 0 is a defect, as in anomalib, with these exceptions:

    - In a JPEG or WebP, and where there are more values than classes of defects can be, compression or resizing has
      left noise: a defect is what is above half of the largest value.
    - With an alpha channel, transparent pixels are no defect. If all pixels have one color, alpha is the mask.
    - With a palette of which no black is used, the first entry is the background.
    """
    with naming(path), _open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        is_noisy = image.format in {"JPEG", "MPO", "WEBP"}
        if image.mode == "F" or image.mode.startswith("I"):
            values = np.array(image)
        else:  # grey would round dark colors down
            colors = np.array(image.convert("RGBA"))
            values, alpha = colors[..., :3].max(-1), colors[..., 3]
            if image.mode == "P" and values.all():
                values = np.array(image)
            elif not (alpha == alpha[0, 0]).all():
                is_one_color = (colors[..., :3] == colors[0, 0, :3]).all()
                values = alpha if is_one_color else np.where(alpha > 0, values, 0)
    is_noisy = is_noisy or len(np.unique(values)) > _MOST_CLASSES
    return Mask(torch.from_numpy(values > (values.max() / 2 if is_noisy else 0)), dtype=torch.uint8)
