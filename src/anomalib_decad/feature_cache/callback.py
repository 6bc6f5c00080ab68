# SPDX-License-Identifier: Apache-2.0
"""Training on features that are computed once."""

import io
import logging
from pathlib import Path
from typing import cast

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from platformdirs import user_cache_path

from anomalib_decad.feature_cache.dataset import CachedFeatures, FeatureBatch, FeatureCode, IndexBatch
from anomalib_decad.feature_cache.source import FeatureSource
from anomalib_decad.feature_cache.store import load_or_build, size_of
from anomalib_decad.ranges import check_range

__all__ = ["FeatureCaching"]

logger = logging.getLogger(__name__)


class FeatureCaching(Callback):
    """Computes the frozen encoder's features of all training images before training, and trains on these.

    The datamodule's training dataset is replaced for the time of the fit, by one of indices. Which images a step sees,
    and in which order, does not change.

    Args:
        mode (str): ``"ram"`` for memory, ``"device"`` for the device's own, ``"disk"`` for a file that later runs use
            again.
        folder (str | Path | None): Folder of the files.
            Defaults to ``None``: a folder in the user's cache.
        limit (float): GiB that the features may take.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, mode: str, folder: str | Path | None = None, limit: float = 16.0) -> None:
        is_mode = mode in {"ram", "device", "disk"}
        check_range(is_mode, "feature_cache", "'off', 'ram', 'device' or 'disk'", repr(mode))
        check_range(limit > 0, "feature_cache_limit", "positive", limit)
        self.mode, self.limit = mode, limit
        self.folder = Path(folder).expanduser() if folder else user_cache_path("anomalib_decad", appauthor=False)
        self._datamodule: AnomalibDataModule | None = None
        self._features: FeatureBatch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the training dataset; the features come later, when the encoder has its weights.

        Raises:
            ValueError: If there is no datamodule, or several nodes.
        """
        del pl_module
        if stage != "fit":
            return
        datamodule = getattr(trainer, "datamodule", None)
        if not isinstance(datamodule, AnomalibDataModule) or trainer.num_nodes > 1:
            msg = "feature_cache needs an anomalib datamodule and a single machine: train with feature_cache=off"
            raise ValueError(msg)
        datamodule.train_data = CachedFeatures(datamodule.train_data)  # type: ignore[assignment]
        self._datamodule = datamodule

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute or find the features. The model is on its device, and its checkpoint has been loaded.

        Raises:
            ValueError: If the images change at random, or the features are larger than the limit.
            OSError: If the folder cannot be written to, or the disk has too little space.
        """
        datamodule = cast("AnomalibDataModule", self._datamodule)
        images, device = cast("CachedFeatures", datamodule.train_data).images, pl_module.device
        # Nothing here may change the random numbers of the training.
        with isolate_rng(), torch.no_grad():
            model, size = cast("AnomalibModule", pl_module), datamodule.eval_batch_size
            source = FeatureSource(model, images, size, datamodule.num_workers, trainer)
            source.check()
            array, code = self._load_or_build(trainer, source)
        codes = torch.from_numpy(array).to(device if self.mode == "device" else "cpu")
        self._features = FeatureBatch(codes, code.to(device), source.grid)

    def look_up(self, batch: IndexBatch) -> FeatureBatch:
        """Gather the features of a batch, on the model's device."""
        table = cast("FeatureBatch", self._features)
        indices = torch.tensor(batch.indices).to(table.codes.device, non_blocking=True)
        return FeatureBatch(table.codes[indices].to(table.code.offset.device), table.code, table.grid)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the images back."""
        del trainer, pl_module
        if self._datamodule is not None:
            self._datamodule.train_data = cast("CachedFeatures", self._datamodule.train_data).images
        self._datamodule = self._features = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the images back."""
        del exception
        self.on_fit_end(trainer, pl_module)

    def _load_or_build(self, trainer: Trainer, source: FeatureSource) -> tuple[np.ndarray, FeatureCode]:
        size, count = size_of(source.shape), source.shape[0]
        if size > self.limit:
            text = f"feature_cache: the features of {count} images need {size:.3g} GiB, more than the limit of "
            msg = f"{text}{self.limit:g} GiB: raise feature_cache_limit, or train with feature_cache=off"
            raise ValueError(msg)
        if self.mode == "disk":
            key = trainer.strategy.broadcast(source.key())
            return load_or_build(self.folder, key, source.shape, self.limit, source.build)
        logger.info("Feature cache: %.3g GiB of memory for %d images.", size, count)
        memory = io.BytesIO()
        code = source.build(memory.write, trainer.is_global_zero)
        return np.frombuffer(memory.getbuffer(), np.float16).reshape(source.shape), code
