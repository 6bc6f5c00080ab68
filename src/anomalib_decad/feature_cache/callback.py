# SPDX-License-Identifier: Apache-2.0
"""Training on features that are computed once."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from anomalib_decad.feature_cache.codec import FeatureCode
from anomalib_decad.feature_cache.dataset import CachedFeatures, FeatureBatch, IndexBatch
from anomalib_decad.feature_cache.source import FeatureSource
from anomalib_decad.feature_cache.store import GIB, FeatureFile, check_folder, default_folder, num_bytes, readable
from anomalib_decad.ranges import check_range

__all__ = ["FeatureCaching"]

logger = logging.getLogger(__name__)


class FeatureCaching(Callback):
    """Computes the frozen encoder's features of all training images before training, and trains on these.

    The datamodule's training dataset is replaced for the time of the fit, by one that reads neither images nor calls
    the encoder. Which images a step sees, and in which order, does not change.

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
        modes = "'off', 'ram', 'device' or 'disk'"
        check_range(mode in {"ram", "device", "disk"}, "feature_cache", modes, repr(mode))
        check_range(limit > 0, "feature_cache_limit", "positive", limit)
        self.mode = mode
        self.folder = Path(folder).expanduser() if folder else default_folder()
        self.limit = limit
        self._datamodule: AnomalibDataModule | None = None
        self._on_device: FeatureBatch | None = None
        self._file: FeatureFile | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the training dataset; the features come later, when the encoder has its weights.

        Args:
            trainer (Trainer): The trainer.
            pl_module (LightningModule): The model.
            stage (str): Only ``"fit"`` matters.

        Raises:
            ValueError: If there is no datamodule, or several nodes.
            OSError: If the folder of the files cannot be made.
        """
        del pl_module
        if stage != "fit":
            return
        if self.mode == "disk":
            check_folder(self.folder)
        datamodule = getattr(trainer, "datamodule", None)
        if not isinstance(datamodule, AnomalibDataModule):
            msg = "feature_cache needs an anomalib datamodule: give one, or train with feature_cache=off"
            raise ValueError(msg)
        if trainer.num_nodes > 1:
            msg = "feature_cache works on one machine, not on several nodes: train with feature_cache=off"
            raise ValueError(msg)
        datamodule.train_data = CachedFeatures(datamodule.train_data)  # type: ignore[assignment]
        self._datamodule = datamodule

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute or find the features, unless :meth:`fill` has."""
        self.fill(trainer, pl_module)

    def fill(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute or find the features, once. The model is on its device, and its checkpoint has been loaded.

        To be called before anything starts the workers of the training dataloader, as the trainer's
        ``estimated_stepping_batches`` does: they would get a dataset without features.

        Args:
            trainer (Trainer): The trainer.
            pl_module (LightningModule): The model.

        Raises:
            ValueError: If the images change at random, or the features are larger than the limit.
            OSError: If the disk has too little space.
        """
        datamodule = cast("AnomalibDataModule", self._datamodule)
        cached = cast("CachedFeatures", datamodule.train_data)
        if cached.is_filled:
            return
        # Nothing here may change the random numbers of the training.
        with isolate_rng(), torch.no_grad():
            source = FeatureSource(
                cast("AnomalibModule", pl_module),
                cached.images,
                datamodule.eval_batch_size,
                datamodule.num_workers,
                trainer,
            )
            source.check()
            features, code = self._find_or_build(trainer, source)
            if self.mode == "device":
                self._on_device = _move(cast("np.ndarray", features), code, source.grid, pl_module.device)
        cached.fill(None if self._on_device else features, code, source.grid)

    def look_up(self, batch: IndexBatch) -> FeatureBatch:
        """Gather a batch of features that are kept on the device."""
        table = cast("FeatureBatch", self._on_device)
        return replace(table, codes=table.codes[batch.indices])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the images back."""
        del trainer, pl_module
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the images back."""
        del trainer, pl_module, exception
        self._restore()

    def _restore(self) -> None:
        if self._datamodule is not None:
            self._datamodule.train_data = cast("CachedFeatures", self._datamodule.train_data).images
            self._datamodule = None
            self._on_device = None
        if self._file is not None:
            self._file.release()
            self._file = None

    def _find_or_build(self, trainer: Trainer, source: FeatureSource) -> tuple[np.ndarray | Path, FeatureCode]:
        shape = source.shape
        size = num_bytes(shape)
        if size > self.limit * GIB:
            msg = (
                f"feature_cache: the features of {shape[0]} images need {readable(size)}, more than the limit of "
                f"{self.limit:g} GiB: raise feature_cache_limit, or train with feature_cache=off"
            )
            raise ValueError(msg)
        if self.mode != "disk" and trainer.world_size == 1:
            logger.info("Feature cache: %s of memory for %d images.", readable(size), shape[0])
            features = np.empty(shape, dtype=np.float16)
            code = source.choose_code()
            source.encode_into(features, range(shape[0]), code)
            return features, code
        with self._shared_folder(trainer) as folder:
            file = FeatureFile(folder, source.key())
            self._build_file(trainer, source, file, size)
            result = file.features if self.mode == "disk" else file.read(), file.read_code()
            trainer.strategy.barrier()
        return result

    def _build_file(self, trainer: Trainer, source: FeatureSource, file: FeatureFile, size: int) -> None:
        """Build a file unless it is there, each process its share of the images."""
        leads = trainer.is_global_zero
        if leads and self.mode == "disk":
            # The workers of a dataloader open it anew in each epoch.
            self._file = file
            file.hold()
        with file.lock() if leads else nullcontext():
            complete = trainer.strategy.broadcast(file.is_complete)
            if complete:
                if leads:
                    logger.info("Feature cache: using %s (%s).", file.path, readable(size))
                    file.touch()
                return
            try:
                if leads:
                    logger.info(
                        "Feature cache: %s on disk for %d images, in %s.", readable(size), source.shape[0], file.path
                    )
                    file.create(source.shape, self.limit)
                    file.write_code(source.choose_code())
                trainer.strategy.barrier()
                features = file.open_partial()
                mine = range(trainer.global_rank, source.shape[0], trainer.world_size)
                source.encode_into(features, mine, file.read_code())
                cast("np.memmap", features).flush()
                trainer.strategy.barrier()
                if leads:
                    file.complete()
            finally:
                if leads:
                    file.discard()
            trainer.strategy.barrier()

    @contextmanager
    def _shared_folder(self, trainer: Trainer) -> Iterator[Path]:
        """Give the folder of the caches, or for features in memory one that all processes share for a moment."""
        if self.mode == "disk":
            yield self.folder
            return
        with tempfile.TemporaryDirectory() if trainer.is_global_zero else nullcontext("") as folder:
            yield Path(trainer.strategy.broadcast(folder))


def _move(features: np.ndarray, code: FeatureCode, grid: tuple[int, int], device: torch.device) -> FeatureBatch:
    """Put features on a device, if they leave half of its free memory to the training."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if features.nbytes > free / 2:
            msg = (
                f"feature_cache=device: the features need {readable(features.nbytes)}, and {readable(free)} of the "
                "device's memory are free, half of which is for the training: train with feature_cache=ram"
            )
            raise ValueError(msg)
    return FeatureBatch(
        torch.from_numpy(features).to(device), FeatureCode(code.offset.to(device), code.scale.to(device)), grid
    )
