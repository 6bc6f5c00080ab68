# SPDX-License-Identifier: Apache-2.0
"""Anomaly maps in the files that MVTec's evaluation programs read."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from lightning.pytorch import LightningModule, Trainer
from torch.nn import functional
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_decad.callbacks.base import PredictionCallback, sees_whole_images
from anomalib_decad.data import PredictionRoot, absolute, image_size
from anomalib_decad.files import atomic_write
from anomalib_decad.metrics import raw_maps_of

__all__ = ["AnomalyMapWriter"]


class AnomalyMapWriter(PredictionCallback):
    """Writes the raw anomaly maps of a test and a prediction as TIFF files.

    They have the size of the image files, and are where MVTec's evaluation looks for them:
    ``anomaly_maps/<category>/test/<kind of defect>/<name>.tiff``; those of a folder to predict are in its own folders.
    Where names differ by their endings only, all but the first keep theirs: ``<name>.png.tiff``.

    Maps are raw before a post-processor normalizes and clips them. This package's models and its
    ``CategoryPostProcessor`` keep them; of other models the maps are written as their post-processor leaves them.

    Args:
        dtype (Literal["float16", "float32"]): Type of the values. MVTec AD 2 asks for float16.
    """

    def __init__(self, dtype: Literal["float16", "float32"]) -> None:
        self.dtype = dtype
        # Of each folder of images: the first file with each stem. Not the first that is written: several processes
        # would not agree on it.
        self._first: dict[Path, dict[str, str]] = {}
        self._root = PredictionRoot()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the model.

        Raises:
            ValueError: If the model crops its images: its maps are not those of the files.
        """
        del trainer
        if stage in {"test", "predict"} and not sees_whole_images(pl_module):
            msg = (
                "save_maps: the model's pre_processor crops images, and no map would fit its file: test and predict "
                "with save_maps=off, or with a pre_processor that resizes only"
            )
            raise ValueError(msg)
        self._first = {}

    def read_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, count: int) -> None:
        """Write the maps of a batch."""
        del pl_module
        maps = raw_maps_of(batch)
        if maps is None or not batch.image_path:
            return
        maps = maps.detach().float().reshape(len(batch.image), 1, *maps.shape[-2:])
        categories = getattr(batch, "category", None) or [None] * len(maps)
        limits = np.finfo(self.dtype)
        for name, category, values in zip(batch.image_path[:count], categories, maps, strict=False):
            path = Path(name)
            below = self._root.below(trainer, name, category) or _last_parts(path, category)
            target = Path(trainer.default_root_dir) / "anomaly_maps" / below.with_name(f"{self._stem(path)}.tiff")
            target.parent.mkdir(parents=True, exist_ok=True)
            width, height = image_size(path)
            resized = functional.interpolate(values[None], (height, width), mode="bilinear", align_corners=False)[0, 0]
            with atomic_write(target) as partial:
                tifffile.imwrite(partial, resized.cpu().numpy().clip(limits.min, limits.max).astype(self.dtype))

    def _stem(self, path: Path) -> str:
        """Give the stem of an image, or its name if another image of the folder has that stem."""
        if path.parent not in self._first:
            names = sorted((p.name for p in path.parent.iterdir() if p.suffix.lower() in IMG_EXTENSIONS), reverse=True)
            self._first[path.parent] = {Path(name).stem: name for name in names}
        return path.stem if self._first[path.parent].get(path.stem, path.name) == path.name else path.name


def _last_parts(path: Path, category: str | None) -> Path:
    """Give the last two parts of a path, below its category."""
    return Path(*([category] if category else []), *absolute(path).parts[-2:])
