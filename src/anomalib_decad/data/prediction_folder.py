# SPDX-License-Identifier: Apache-2.0
"""A folder of images to predict, which anomalib's dataset lists and reads, and where its images are."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from anomalib.data import ImageBatch, ImageItem, PredictDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_decad.compat import predict_datasets
from anomalib_decad.data import reading
from anomalib_decad.data.dataset import CategoryDataset
from anomalib_decad.progress import progress_bar

__all__ = ["PredictionFolder", "PredictionRoot", "absolute"]

logger = logging.getLogger(__name__)

# Images of a folder that tell its white level, and as many files as take seconds to read.
_WHITES, _MANY = 16, 200


class PredictionFolder(Callback):
    """Reads a folder of images to predict as ``MultiCategory`` reads them, with any anomalib model.

    Files that cannot be read are named and left out. Images of high bit depth, which anomalib clips to white, and
    images with an EXIF orientation are read again. The white level is that of the training (``white_levels`` of the
    model) if all categories had the same, or else what fits the images of the folder.
    """

    def __init__(self) -> None:
        #: Why a file cannot be read, by its path.
        self.unreadable: dict[str, str] = {}
        self._white_levels: Mapping[str, float] = {}
        self._white: float | None = None
        self._misread: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at the files, before the first of them is read; OSError if none can be."""
        del pl_module
        self.unreadable, self._misread, self._white = {}, set(), None
        datasets = predict_datasets(trainer) if stage == "predict" else []
        datasets = [dataset for dataset in datasets if isinstance(dataset, PredictDataset) and dataset.image_filenames]
        for dataset in datasets:
            files = [str(path) for path in dataset.image_filenames]
            # One image may have been given by its name: what is below its folder may be anything.
            root = Path(os.path.commonpath([Path(file).parent for file in files]))
            others = reading.other_images(root.glob("*" if len(files) == 1 else "**/*"), IMG_EXTENSIONS)
            if others:
                logger.warning("%d images are not predicted, as anomalib does not take their format: %s",
                               len(others), ", ".join(map(str, others[:3])))  # fmt: skip
            with progress_bar("Checking the images", trainer.is_global_zero and len(files) >= _MANY) as progress:
                found = _read_all(files, progress)
            self.unreadable |= {path: reason for path, reason in found.items() if reason}
            if dataset.transform is None:
                self._misread |= found.keys() - self.unreadable.keys()
            dataset.image_filenames = [path for path in dataset.image_filenames if str(path) not in self.unreadable]
        for path, reason in self.unreadable.items():
            logger.warning("%s cannot be read and is skipped: %s", path, reason)
        if self.unreadable and not any(dataset.image_filenames for dataset in datasets):
            path, reason = next(iter(self.unreadable.items()))
            msg = f"none of the {len(self.unreadable)} files can be read, for example {path}: {reason}"
            raise OSError(msg)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the white levels of the model, which its checkpoint has brought by now."""
        del trainer
        self._white_levels = getattr(pl_module, "white_levels", {})

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Read the images of a batch again, before the pre-processor, if anomalib has read one of them wrongly.

        The images, of shape (B, 3, H, W) and in [0, 1], may have another size then.
        """
        del trainer, pl_module, batch_idx, dataloader_idx
        if not self._misread.isdisjoint(getattr(batch, "image_path", None) or ()):
            whites = [self.white_of() if reading.is_high_bit_depth(path) else 1.0 for path in batch.image_path]
            images = map(reading.read_image, batch.image_path, whites)
            again: Any = ImageBatch.collate([ImageItem(image=image) for image in images])
            batch.image = again.image.to(batch.image)

    def white_of(self) -> float:
        """Give the white level of the folder."""
        if self._white is None:
            levels, why = set(self._white_levels.values()), "as in the training"
            if len(levels) != 1:
                high = sorted(filter(reading.is_high_bit_depth, self._misread))
                levels, why = {reading.white_level(high[:: max(1, len(high) // _WHITES)])}, "as their values fit it"
            self._white = levels.pop()
            logger.warning("Images of more than 8 bits: %g is white, %s.", self._white, why)
        return self._white


def _read_all(paths: Sequence[str], progress: Callable[[float], None]) -> dict[str, str]:
    """Find the files that cannot be read, with the reason, and those that anomalib reads wrongly, with none."""

    def read(path: str) -> str | None:
        try:
            reading.read_values(path)
            return "" if reading.is_misread_by_anomalib(path) else None
        except Exception as error:  # Pillow's plug-ins raise of all kinds.
            return str(error) or type(error).__name__

    found = {}
    with ThreadPoolExecutor() as pool:
        for number, (path, reason) in enumerate(zip(paths, pool.map(read, paths), strict=True), 1):
            progress(number / len(paths))
            if reason is not None:
                found[path] = reason
    return found


class PredictionRoot:
    """Finds where images are below the folder that has all (of a category), so that equal names stay apart."""

    def __init__(self) -> None:
        self._roots: dict[Any, Path | None] = {}

    def below(self, trainer: Trainer, path: str, category: str | None = None) -> Path | None:
        """Give the path of an image from that folder, without any ``..``, below the name of its category.

        Without a category it is an image of a folder to predict. ``None`` if the trainer has no such images.
        """
        has_category = category is not None
        datasets = [data for data in running_datasets(trainer) if isinstance(data, CategoryDataset) == has_category]
        key = category, *((len(files), str(next(iter(files)))) for files in map(_files_of, datasets) if len(files))
        if key not in self._roots:
            folders = {absolute(file).parent for dataset in datasets for file in _files_of(dataset, category)}
            self._roots[key] = Path(os.path.commonpath(folders)).parent if folders else None
        root, found = self._roots[key], absolute(path)
        if not (path and root and found.is_relative_to(root)):
            return None
        return Path(category or "") / found.relative_to(root)


def running_datasets(trainer: Trainer) -> list[Any]:
    """List the datasets that a trainer predicts or tests with; none while it does neither."""
    loaders = trainer.predict_dataloaders if trainer.predicting else trainer.test_dataloaders if trainer.testing else []
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    return [loader.dataset for loader in loaders if hasattr(loader, "dataset")]


def _files_of(dataset: Any, category: str | None = None) -> Sequence[str | Path]:
    if isinstance(dataset, CategoryDataset):
        samples = dataset.samples
        return list(samples.image_path if category is None else samples.image_path[samples.category == category])
    return getattr(dataset, "image_filenames", ())


def absolute(path: str | Path) -> Path:
    """Make a path absolute, without any ``..``: what is written below a folder stays in it."""
    return Path(os.path.abspath(path))  # noqa: PTH100  # Links are not followed, as by resolve().
