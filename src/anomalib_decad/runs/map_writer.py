# SPDX-License-Identifier: Apache-2.0
"""Anomaly maps in the files that MVTec's evaluation programs read."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch.nn import functional
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_decad.data import PredictionRoot
from anomalib_decad.data.prediction_root import plain
from anomalib_decad.data.transforms import sees_whole_images
from anomalib_decad.metrics import put_before_post_processor
from anomalib_decad.whole_files import replacing

__all__ = ["MapWriter"]


class MapWriter(Callback):
    """Writes the anomaly maps of a test and a prediction, as they are before the post-processor, as TIFF files.

    They have the size of the image files, and are where MVTec's evaluation looks for them:
    ``anomaly_maps/<category>/test/<kind of defect>/<name>.tiff``; those of a folder to predict are in its own folders.
    Where names differ by their endings only, all but the first keep theirs: ``<name>.png.tiff``.

    Args:
        dtype (Literal["float16", "float32"]): Type of the values. MVTec AD 2 asks for float16.
    """

    def __init__(self, dtype: Literal["float16", "float32"]) -> None:
        self.dtype = dtype
        # Of each folder of images: the first file with each name without its ending. Not the first that is written, as
        # several processes would not agree on it.
        self._first: dict[Path, dict[str, str]] = {}
        self._root = PredictionRoot()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Step in front of the post-processor, which normalizes and clips the maps.

        Raises:
            ValueError: If the model crops its images, whose maps are not those of the files then.
        """
        if stage in {"test", "predict"} and not sees_whole_images(pl_module):
            msg = (
                "save_maps: the model's pre_processor crops images, and no map would fit its file: test and predict "
                "with save_maps=off, or with a pre_processor that resizes only"
            )
            raise ValueError(msg)
        self._first = {}
        put_before_post_processor(trainer, self)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the maps of a batch."""
        del pl_module, outputs, batch_idx, dataloader_idx
        self._write(trainer, batch)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the maps of a batch."""
        del pl_module, batch, batch_idx, dataloader_idx
        self._write(trainer, outputs)

    def _write(self, trainer: Trainer, batch: Any) -> None:
        if batch.anomaly_map is None or not batch.image_path:
            return
        folder = Path(trainer.default_root_dir) / "anomaly_maps"
        categories = getattr(batch, "category", None) or [None] * len(batch.image)
        maps = batch.anomaly_map.detach().float().reshape(len(categories), 1, *batch.anomaly_map.shape[-2:])
        for name, category, values in zip(batch.image_path, categories, maps, strict=True):
            path = Path(name)
            below = self._root.below(trainer, name) or _below(path, category)
            target = folder / below.with_name(f"{self._name(path)}.tiff")
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as image:
                size = image.height, image.width
            resized = functional.interpolate(values[None], size, mode="bilinear", align_corners=False)[0, 0]
            with replacing(target) as partial:
                tifffile.imwrite(partial, _as(resized, self.dtype))

    def _name(self, path: Path) -> str:
        """Give the name of an image without its ending, or with it if another image of the folder has that one."""
        if path.parent not in self._first:
            names = sorted((p.name for p in path.parent.iterdir() if p.suffix.lower() in IMG_EXTENSIONS), reverse=True)
            self._first[path.parent] = {Path(name).stem: name for name in names}
        return path.stem if self._first[path.parent].get(path.stem, path.name) == path.name else path.name


def _below(path: Path, category: str | None) -> Path:
    """Give the part of a path from its category on, or else its last two parts."""
    parts = plain(path).parts
    if category in parts:
        last = len(parts) - 1 - parts[::-1].index(category)
        return Path(*parts[last:])
    return Path(*([category] if category else []), *parts[-2:])


def _as(values: torch.Tensor, dtype: str) -> np.ndarray:
    limits = np.finfo(dtype)
    return values.cpu().numpy().clip(limits.min, limits.max).astype(dtype)
