# SPDX-License-Identifier: Apache-2.0
"""Images of more than 8 bits where anomalib's own datasets have read them."""

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from anomalib.data import AnomalibDataModule, AnomalibDataset, ImageBatch, PredictDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torchvision.transforms.v2.functional import resize

from anomalib_decad.compat import trainer_of
from anomalib_decad.data.category_batch import CategoryBatch
from anomalib_decad.data.category_dataset import CategoryDataset
from anomalib_decad.data.checks import look_at_subsets
from anomalib_decad.data.reading import FULL_WHITE, find_white, is_deep, read_image
from anomalib_decad.data.visualizer import CategoryVisualizer

__all__ = ["DeepImagesMixin"]

logger = logging.getLogger(__name__)

_KEY = "anomalib_decad_whites"

# Images of a folder that find its white.
_SAMPLE = 16


if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule as _Base
else:
    _Base = object


class DeepImagesMixin(_Base):
    """Has a model read images of more than 8 bits again, which anomalib's datasets have clipped to white.

    ``MultiCategory`` reads its images itself. A folder of images to predict is read by anomalib: of those, the ones of
    more than 8 bits are read once more. Their white is that of the training images if all products had the same, or
    else found by the images of the folder. Images of anomalib's other datasets, which may have been augmented, stay as
    they are, with a warning.
    """

    #: The value of white in each product's images of more than 8 bits, as in the training.
    _whites: Mapping[str, float] = MappingProxyType({})
    _white: tuple[Any, float] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the values of white.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.
        """
        super().on_save_checkpoint(checkpoint)
        self._whites = self._known_whites()
        checkpoint[_KEY] = dict(self._whites)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the values of white.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.
        """
        super().on_load_checkpoint(checkpoint)
        self._whites = dict(checkpoint.get(_KEY, {}))

    @classmethod
    def configure_visualizer(cls) -> CategoryVisualizer:
        """Configure the visualizer, which draws such images as the model has seen them.

        Returns:
            CategoryVisualizer: The visualizer.
        """
        return CategoryVisualizer()

    def white_of(self, category: str | None) -> float:
        """Give the value of white that images of more than 8 bits were scaled by.

        Args:
            category (str | None): Category of the image; ``None`` for images of a folder.

        Returns:
            float: The value.
        """
        if category is None:
            return self._white[1] if self._white else FULL_WHITE
        return self._known_whites().get(category, FULL_WHITE)

    def _known_whites(self) -> Mapping[str, float]:
        """Give the values of white of the data at hand, or else of the training."""
        return getattr(getattr(trainer_of(self), "datamodule", None), "whites", None) or self._whites

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Give the model's callbacks, behind one that reads images of more than 8 bits again.

        Returns:
            Sequence[Callback] | Callback: The callbacks.
        """
        callbacks = super().configure_callbacks()
        return [_Look(), *([callbacks] if isinstance(callbacks, Callback) else callbacks)]

    def read_again(self, batch: Any, dataset: PredictDataset) -> None:
        """Read the images of a batch again that have more than 8 bits.

        Args:
            batch (Any): A batch of the dataset, whose images change.
            dataset (PredictDataset): Images of a folder.
        """
        for index, path in enumerate(batch.image_path):
            if is_deep(path):
                image = read_image(path, self._find_white(dataset, path))
                batch.image[index] = resize(image, list(batch.image.shape[-2:]), antialias=True)

    def _find_white(self, dataset: PredictDataset, path: str) -> float:
        if self._white is None or self._white[0] is not dataset:
            trained = set(self._whites.values())
            if len(trained) == 1:
                white, why = trained.pop(), "as in the training"
            else:
                paths: Sequence[Any] = [name for name in dataset.image_filenames if is_deep(name)] or [path]
                step = max(1, len(paths) // _SAMPLE)
                white, kind = find_white(paths[::step])
                why = f"as their values fit {kind}"
            logger.warning("Images of more than 8 bits: %g is white, %s.", white, why)
            self._white = dataset, white
        return self._white[1]


class _Look(Callback):
    """Looks at data that is not ``MultiCategory``'s, before the pre-processor, which is a callback, too."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which kinds of images the test and validation set lack."""
        del pl_module
        datamodule = getattr(trainer, "datamodule", None)
        sets = {subset: getattr(datamodule, f"{subset}_data", None) for subset in ("test", "val")}
        tables = {subset: data.samples for subset, data in sets.items() if isinstance(data, AnomalibDataset)}
        if not isinstance(datamodule, AnomalibDataModule) or any(isinstance(s, CategoryDataset) for s in sets.values()):
            return
        findings = look_at_subsets(tables)
        if findings and all("label_index" in table for table in tables.values()):
            _warn_about("; ".join(findings))

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Scale images of more than 8 bits."""
        loaders = trainer.predict_dataloaders
        loader = loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders
        dataset = getattr(loader, "dataset", None)
        if isinstance(dataset, PredictDataset) and dataset.transform is None:
            cast("DeepImagesMixin", pl_module).read_again(batch, dataset)
        else:
            _warn_if_white(batch, batch_idx)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Say that images of more than 8 bits are white."""
        del pl_module, batch_idx
        _warn_if_white(batch, trainer.global_step)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Say that images of more than 8 bits are white."""
        del trainer, pl_module, dataloader_idx
        _warn_if_white(batch, batch_idx)


@rank_zero_only
def _warn_about(findings: str) -> None:
    logger.warning("The data has %s.", findings)


def _warn_if_white(batch: Any, index: int) -> None:
    """Look at the first batch of a run."""
    if index or not isinstance(batch, ImageBatch) or isinstance(batch, CategoryBatch):
        return
    if any(map(is_deep, batch.image_path or ())):
        logger.warning(
            "The images have more than 8 bits, of which anomalib's datasets make white. Use MultiCategory, which "
            "scales them, also for one category."
        )
