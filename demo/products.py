# SPDX-License-Identifier: Apache-2.0
"""Draw a small data set in MVTec AD's layout: five products, with and without defects.

usage: python demo/products.py FOLDER [--products gear,cap] [--size 280]

Four products are drawn, and one is cut out of a photograph that scikit-image ships. Pieces differ in pose, material,
light and sensor noise. Each defect comes in three strengths, and the name of its folder says which it is, such as
``scratch_faint``. A mask is where a piece differs from the same piece without the defect.
"""

from __future__ import annotations

import argparse
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

import shapes
from scene import Array, Camera, light
from shapes import Flaw

#: How much of a defect each strength is.
STRENGTHS = {"faint": 0.35, "medium": 0.65, "strong": 1.0}
#: The defects of each product.
PRODUCTS = {
    "brick": ("crack", "scratch", "stain"),
    "cap": ("dent", "misprint", "scratch"),
    "connector": ("bent_pin", "crack", "scratch"),
    "gear": ("dent", "missing_tooth", "scratch"),
    "label": ("loose_thread", "misprint", "stain"),
}
#: Side of the images in pixels.
SIZE = 280
# The photograph of bricks is divided: images to test with are of another part of the wall.
_ROWS = {"train": (0, 300), "test": (300, 512)}
# A mask has what differs by this share of the largest difference, of which no more than so much counts: a glint is not
# all of a dent.
_SHARE, _MOST = 0.25, 0.14


@dataclass(frozen=True)
class Drawing:
    """A photograph of a piece.

    Args:
        image (Array): 8-bit colors (red, green, blue) of shape (H, W, 3).
        mask (Array): 255 where the defect is, of shape (H, W).
        clean (Array): The same photograph without the defect.
    """

    image: Array
    mask: Array
    clean: Array


def draw(
    product: str, number: int, *, split: str = "test", kind: str = "", strength: str = "strong", size: int = SIZE
) -> Drawing:
    """Draw a piece. The same arguments give the same picture; other defects of one number are on the same piece.

    Args:
        product (str): Its name, one of ``PRODUCTS``.
        number (int): Which piece.
        split (str): ``train`` or ``test``: they have no piece in common.
        kind (str): Kind of the defect; none without.
        strength (str): One of ``STRENGTHS``.
        size (int): Side of the picture in pixels.
    """
    if kind and kind not in PRODUCTS[product]:
        msg = f"{product} has no defect {kind!r}, but {', '.join(PRODUCTS[product])}"
        raise ValueError(msg)
    seed = [zlib.crc32(f"{product}/{split}".encode()), number]
    camera = Camera.draw(np.random.default_rng([*seed, 2]), size)

    def colors(flaw: Flaw) -> Array:
        rng = np.random.default_rng([*seed, 0])
        rows = {"rows": _ROWS[split]} if product == "brick" else {}
        surface = getattr(shapes, product)(size, rng, flaw, **rows)
        return light(surface, np.random.default_rng([*seed, 1]))

    def photograph(scene: Array) -> Array:
        return np.round(camera.expose(scene) * 255).astype(np.uint8)

    # Where the defect is depends on its kind, too, but not on its strength.
    flaw = Flaw(kind, STRENGTHS[strength] if kind else 0.0, zlib.crc32(f"{seed} {kind}".encode()))
    without = colors(Flaw(seed=flaw.seed))
    clean = photograph(without)
    if not kind:
        return Drawing(clean, np.zeros((size, size), np.uint8), clean)
    with_defect = colors(flaw)
    return Drawing(photograph(with_defect), mask_of(camera, without, with_defect), clean)


def mask_of(camera: Camera, without: Array, with_defect: Array) -> Array:
    """Find where a defect changes a photograph, its noise aside; what shadows change at its sides is faint."""
    pair = [camera.expose(scene, with_noise=False) for scene in (without, with_defect)]
    difference = cv2.GaussianBlur(np.abs(pair[0] - pair[1]).max(axis=2), (0, 0), 0.7)
    mask = (difference > _SHARE * min(difference.max(), _MOST)).astype(np.uint8)
    # The slopes of a dent differ, its bottom may not; a person would mark all of it.
    side = max(3, round(camera.sensor.shape[0] * 0.045) | 1)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    padded = cv2.copyMakeBorder(mask, side, side, side, side, cv2.BORDER_CONSTANT)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, kernel)[side:-side, side:-side]
    outlines, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros_like(closed), outlines, -1, 1, cv2.FILLED)
    return cv2.dilate(filled, np.ones((3, 3), np.uint8)) * 255


def write(path: Path, image: Array) -> None:
    """Write an image and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image):
        msg = f"cannot write {path}"
        raise OSError(msg)


def build(
    folder: Path,
    products: Sequence[str] = tuple(PRODUCTS),
    *,
    train: int = 60,
    good: int = 12,
    each: int = 2,
    size: int = SIZE,
) -> None:
    """Write the data set, whole or not at all.

    Args:
        folder (Path): Where; it must not exist.
        products (Sequence[str]): Some of ``PRODUCTS``.
        train (int): Images to train with, of each product.
        good (int): Normal images to test with.
        each (int): Images to test with, of each kind and strength of defect.
        size (int): Side of the images in pixels.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for product in products:
        root = partial / product
        for number in range(train):
            write(root / "train" / "good" / f"{number:03}.png", draw(product, number, split="train", size=size).image)
        for number in range(good):
            write(root / "test" / "good" / f"{number:03}.png", draw(product, number, size=size).image)
        for place, kind in enumerate(PRODUCTS[product]):
            for strength in STRENGTHS:
                for index in range(each):
                    # The same pieces at each strength, so that only the defect differs.
                    number = good + place * each + index
                    drawing = draw(product, number, kind=kind, strength=strength, size=size)
                    name = f"{kind}_{strength}"
                    write(root / "test" / name / f"{index:03}.png", drawing.image)
                    write(root / "ground_truth" / name / f"{index:03}_mask.png", drawing.mask)
    partial.replace(folder)


def main() -> None:
    """Build the data set, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the data set")
    parser.add_argument("--products", default=",".join(PRODUCTS), help="comma-separated (default: all)")
    parser.add_argument("--size", type=int, default=SIZE, help=f"side of the images in pixels (default: {SIZE})")
    arguments = parser.parse_args()
    names = arguments.products.split(",")
    if unknown := sorted(set(names) - set(PRODUCTS)):
        parser.error(f"--products: no {', '.join(unknown)}; there are {', '.join(PRODUCTS)}")
    if not arguments.folder.is_dir():
        build(arguments.folder, names, size=arguments.size)
        print(f"Products with defects: {arguments.folder}")


if __name__ == "__main__":
    main()
