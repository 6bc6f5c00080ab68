# SPDX-License-Identifier: Apache-2.0
"""anomalib's pictures of predictions, in a folder for each category."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Trainer
from PIL.Image import Image, registered_extensions
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_decad.data.prediction_folder import PredictionFolder
from anomalib_decad.data.reading import FULL_WHITE, is_high_bit_depth, is_misread_by_anomalib, read_image
from anomalib_decad.files import atomic_write

__all__ = ["CategoryVisualizer", "place_of"]


class CategoryVisualizer(ImageVisualizer):
    """anomalib's visualizer, for batches that know the category of each image.

    The pictures are in ``images/<category>/``, below the last two folders of the images' paths.
    Images that anomalib reads wrongly (high bit depth, EXIF orientation) are drawn as the model has seen them. It can
    be given to any anomalib model: ``visualizer=CategoryVisualizer()``.
    """

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Save the pictures of a batch."""
        del pl_module, outputs, args
        # Not kept: the next run has a folder of its own.
        output_dir = Path(self.output_dir or Path(trainer.default_root_dir) / "images")
        for item in batch:
            category, path = getattr(item, "category", None), item.image_path or ""
            target = output_dir / place_of(path, category)
            target.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory() as temporary:
                if path and is_misread_by_anomalib(path):
                    # The picture is drawn on the file.
                    item.image_path = f"{temporary}/image.png"
                    white = _white_level(trainer, category) if is_high_bit_depth(path) else FULL_WHITE
                    to_pil_image(read_image(path, white)).save(item.image_path)
                picture = self.visualize(item)
            if isinstance(picture, Image):
                with atomic_write(target) as partial:  # which has another ending
                    picture.save(partial, format=registered_extensions()[target.suffix.lower()])


def place_of(path: str | Path, category: str | None = None) -> Path:
    """Give where a file of an image belongs: its last two folders and its name, below its category, or a third folder.

    Example:
        >>> place_of("/data/bolts/test/scratch/000.png", "bolts").as_posix()
        'bolts/test/scratch/000.png'
    """
    # Without any "..", so that what is written below a folder stays in it. Links are not followed, as by resolve().
    parts = Path(os.path.abspath(path)).parts[1:]  # noqa: PTH100
    return Path(category, *parts[-3:]) if category else Path(*parts[-4:])


def _white_level(trainer: Trainer, category: str | None) -> float:
    if category is None:
        folders = (callback for callback in trainer.callbacks if isinstance(callback, PredictionFolder))  # type: ignore[attr-defined]
        return next((folder.white_of(trainer) for folder in folders), FULL_WHITE)
    return getattr(getattr(trainer, "datamodule", None), "white_levels", {}).get(category, FULL_WHITE)
