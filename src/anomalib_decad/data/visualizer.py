# SPDX-License-Identifier: Apache-2.0
"""anomalib's pictures of predictions, in a folder for each category."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Trainer
from PIL.Image import Image, registered_extensions
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_decad.data.prediction_folder import PredictionFolder, PredictionRoot, running_datasets
from anomalib_decad.data.reading import FULL_WHITE, is_high_bit_depth, is_misread_by_anomalib, read_image
from anomalib_decad.files import atomic_write

__all__ = ["CategoryVisualizer"]


class CategoryVisualizer(ImageVisualizer):
    """anomalib's visualizer, for batches that know the category of each image.

    The pictures are in ``images/<category>/``, wherever the images are, or as the images below a folder to predict.
    Images that anomalib reads wrongly (high bit depth, EXIF orientation) are drawn as the model has seen them. It can
    be given to any anomalib model: ``visualizer=CategoryVisualizer()``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._root = PredictionRoot()
        if self.text_config.get("size") is None:
            # anomalib's own size is too large for its longest title, "Image + Anomaly Map".
            self.text_config["size"] = max(8, self.field_size[0] * 20 // 256)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Save the pictures of a batch."""
        del pl_module, outputs, batch_idx, dataloader_idx
        # Not kept: the next run has a folder of its own.
        output_dir = Path(self.output_dir or Path(trainer.default_root_dir) / "images")
        for item in batch:
            category, path = getattr(item, "category", None), item.image_path or ""
            if (below := self._root.below(trainer, path, category)) is not None:
                target = output_dir / below
                target.parent.mkdir(parents=True, exist_ok=True)
            else:
                names = [getattr(getattr(trainer, "datamodule", None), name, None) for name in ("name", "category")]
                target = generate_output_filename(path, output_dir / (category or ""), category or names[0], names[1])
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


def _white_level(trainer: Trainer, category: str | None) -> float:
    if category is None:
        folders = (callback for callback in trainer.callbacks if isinstance(callback, PredictionFolder))  # type: ignore[attr-defined]
        return next((folder.white_of() for folder in folders), FULL_WHITE)
    levels = (getattr(dataset, "white_levels", {}).get(category) for dataset in running_datasets(trainer))
    return next((level for level in levels if level is not None), FULL_WHITE)
