# SPDX-License-Identifier: Apache-2.0
"""Anomaly maps in the files that MVTec's evaluation programs read."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from lightning.pytorch import LightningModule, Trainer
from torch.nn import functional

from anomalib_decad.callbacks.base import PredictionCallback, sees_whole_images
from anomalib_decad.data import image_size, place_of
from anomalib_decad.files import atomic_write
from anomalib_decad.metrics import raw_maps_of

__all__ = ["AnomalyMapWriter"]


class AnomalyMapWriter(PredictionCallback):
    """Writes the raw anomaly maps of a test and a prediction as TIFF files.

    They have the size of the image files, and are where MVTec's evaluation looks for them:
    ``anomaly_maps/<category>/test/<kind of defect>/<name>.tiff``, as :func:`place_of` has it.

    Maps are raw before a post-processor normalizes and clips them. This package's models and its
    ``CategoryPostProcessor`` keep them; of other models the maps are written as their post-processor leaves them.

    Args:
        dtype (Literal["float16", "float32"]): Type of the values. MVTec AD 2 asks for float16.
    """

    def __init__(self, dtype: Literal["float16", "float32"]) -> None:
        self.dtype = dtype

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

    def read_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, count: int) -> None:
        """Write the maps of a batch."""
        del pl_module
        maps = raw_maps_of(batch)
        if maps is None or not batch.image_path:
            return
        maps = maps.detach().float().reshape(len(batch.image), 1, *maps.shape[-2:])
        categories = getattr(batch, "category", None) or [None] * len(maps)
        limits = np.finfo(self.dtype)
        for path, category, values in zip(batch.image_path[:count], categories, maps, strict=False):
            target = Path(trainer.default_root_dir) / "anomaly_maps" / place_of(path, category).with_suffix(".tiff")
            target.parent.mkdir(parents=True, exist_ok=True)
            width, height = image_size(path)
            resized = functional.interpolate(values[None], (height, width), mode="bilinear", align_corners=False)[0, 0]
            with atomic_write(target) as partial:
                tifffile.imwrite(partial, resized.cpu().numpy().clip(limits.min, limits.max).astype(self.dtype))
