# SPDX-License-Identifier: Apache-2.0
"""Build a small data set in MVTec AD's layout from textures that scikit-image ships.

usage: python demo/textures.py FOLDER

Three categories (brick, grass, gravel), each with crops of one part of the photograph to train with, and crops of
another part to test with, some of them with defects from anomalib's Perlin anomaly generator.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import cv2
import numpy as np
import skimage.data
import torch
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from lightning.pytorch import seed_everything

CATEGORIES = ("brick", "grass", "gravel")
_TRAIN, _TEST_GOOD, _TEST_DEFECT = 40, 8, 12
_CROP = 200
_LAST_TRAIN_ROW = 300
_SIZE = 280
# A defect covers this share of the image.
_SMALLEST, _LARGEST = 0.005, 0.15


def crop(texture: np.ndarray, first_row: int, last_row: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a random square out of some rows of a texture, flip it at random and bring it to the image size."""
    y = int(rng.integers(first_row, last_row - _CROP + 1))
    x = int(rng.integers(0, texture.shape[1] - _CROP + 1))
    square = texture[y : y + _CROP, x : x + _CROP]
    square = square[:, ::-1] if rng.random() < 0.5 else square
    return cv2.resize(np.ascontiguousarray(square), (_SIZE, _SIZE), interpolation=cv2.INTER_CUBIC)


def add_defect(image: np.ndarray, generator: PerlinAnomalyGenerator) -> tuple[np.ndarray, np.ndarray]:
    """Add a defect of reasonable size; return the image and its mask, both 8 bit."""
    tensor = torch.from_numpy(cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)).permute(2, 0, 1).float() / 255
    while True:
        augmented, mask = generator(tensor)
        if _SMALLEST < mask.float().mean() < _LARGEST:
            pixels = (augmented.permute(1, 2, 0).numpy() * 255).clip(0, 255).astype(np.uint8)
            return pixels[..., ::-1], (mask.squeeze().numpy() > 0).astype(np.uint8) * 255


def write(path: Path, image: np.ndarray) -> None:
    """Write an image and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image):
        msg = f"cannot write {path}"
        raise OSError(msg)


def build(folder: Path) -> None:
    """Write the data set, whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    seed_everything(0, verbose=False)
    rng = np.random.default_rng(0)
    generator = PerlinAnomalyGenerator(probability=1.0, blend_factor=(0.4, 0.9))
    for category in CATEGORIES:
        texture = getattr(skimage.data, category)()
        height = texture.shape[0]
        for number in range(_TRAIN):
            write(partial / category / "train/good" / f"{number:03}.png", crop(texture, 0, _LAST_TRAIN_ROW, rng))
        for number in range(_TEST_GOOD):
            write(partial / category / "test/good" / f"{number:03}.png", crop(texture, _LAST_TRAIN_ROW, height, rng))
        for number in range(_TEST_DEFECT):
            image, mask = add_defect(crop(texture, _LAST_TRAIN_ROW, height, rng), generator)
            write(partial / category / "test/perlin" / f"{number:03}.png", image)
            write(partial / category / "ground_truth/perlin" / f"{number:03}_mask.png", mask)
    partial.replace(folder)


def main() -> None:
    """Build the data set, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the data set")
    folder = parser.parse_args().folder
    if not folder.is_dir():
        build(folder)
        print(f"Textures with Perlin defects: {folder}")


if __name__ == "__main__":
    main()
