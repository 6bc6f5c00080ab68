# SPDX-License-Identifier: Apache-2.0
"""A folder of images to predict, which anomalib's dataset lists and reads."""

import logging
from pathlib import Path
from typing import Any

from anomalib.data import ImageBatch, ImageItem, PredictDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_decad.data import reading

__all__ = ["PredictionFolder"]

logger = logging.getLogger(__name__)

_WHITES = 16  # images of a folder that tell its white level


class PredictionFolder(Callback):
    """Reads a folder of images to predict as ``MultiCategory`` reads them, with any anomalib model.

    Images of high bit depth, which anomalib clips to white, and images with an EXIF orientation are read again. The
    white level is that of the training (``white_levels`` of the model) if all categories had the same, or else what
    fits the images of the folder. Images of formats that anomalib does not take are named.
    """

    def __init__(self) -> None:
        self._levels: set[float] = set()
        self._white: float | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the white levels of the model, which its checkpoint has brought by now, and look for other formats."""
        for folder in {Path(path).parent for data in _folders(trainer) for path in data.image_filenames[1:]}:
            if others := reading.other_images(folder.iterdir(), IMG_EXTENSIONS):
                text = "%s: %d images are not predicted, as anomalib does not take their format, the first is %s."
                logger.warning(text, folder, len(others), others[0].name)
        self._levels, self._white = set(getattr(pl_module, "white_levels", {}).values()), None

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Read the images of a batch again, before the pre-processor, if anomalib has read one of them wrongly.

        The images, of shape (B, 3, H, W) and in [0, 1], may have another size then.
        """
        del pl_module, batch_idx, dataloader_idx
        paths = getattr(batch, "image_path", None) or ()
        if _folders(trainer) and any(map(reading.is_misread_by_anomalib, paths)):
            whites = [self.white_of(trainer) if reading.is_high_bit_depth(path) else 1.0 for path in paths]
            images = map(reading.read_image, paths, whites)
            again: Any = ImageBatch.collate([ImageItem(image=image) for image in images])
            batch.image = again.image.to(batch.image)

    def white_of(self, trainer: Trainer) -> float:
        """Give the white level of the folder."""
        if self._white is None:
            levels, why = self._levels, "as in the training"
            if len(levels) != 1:
                files = [str(path) for folder in _folders(trainer) for path in folder.image_filenames]
                high = sorted(filter(reading.is_high_bit_depth, files))
                levels, why = {reading.white_level(high[:: max(1, len(high) // _WHITES)])}, "as their values fit it"
            (self._white,) = levels
            logger.warning("Images of more than 8 bits: %g is white, %s.", self._white, why)
        return self._white


def _folders(trainer: Trainer) -> list[PredictDataset]:
    """List the folders that a trainer predicts, whose images are as they were read."""
    loaders = trainer.predict_dataloaders
    datasets = [getattr(loader, "dataset", None) for loader in (loaders if isinstance(loaders, list) else [loaders])]
    return [data for data in datasets if isinstance(data, PredictDataset) and data.transform is None]
