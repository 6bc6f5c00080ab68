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

from anomalib_decad.data.prediction_root import PredictionRoot
from anomalib_decad.data.reading import FULL_WHITE, is_deep, read_image
from anomalib_decad.whole_files import replacing

__all__ = ["CategoryVisualizer"]


class CategoryVisualizer(ImageVisualizer):
    """anomalib's visualizer, for batches that know the category of each image.

    The pictures are in ``images/<category>/``, wherever the images are: anomalib's visualizer looks for the name of the
    dataset in their paths, behind which VisA, Real-IAD and Kaputt have other folders first. Images of more than 8 bits
    are drawn as the model has seen them. It can be given to any anomalib model (``visualizer=CategoryVisualizer()``).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prediction_root = PredictionRoot()
        if self.text_config.get("size") is None:
            # anomalib's own size is too large for its longest title, "Image + Anomaly Map".
            self.text_config["size"] = max(8, self.field_size[0] * 20 // 256)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save the pictures of a batch."""
        del outputs, batch_idx, dataloader_idx
        # Not kept: the next run has a folder of its own.
        output_dir = Path(self.output_dir or Path(trainer.default_root_dir) / "images")
        datamodule = getattr(trainer, "datamodule", None)
        white_of = getattr(pl_module, "white_of", lambda _: FULL_WHITE)
        for item in batch:
            category, path = getattr(item, "category", None), item.image_path or ""
            if category is not None:
                folder = output_dir / category
                target = generate_output_filename(path, folder, dataset_name=category)
            elif (below := self._prediction_root.below(trainer, path)) is not None:
                target = output_dir / below
                target.parent.mkdir(parents=True, exist_ok=True)
            else:
                names = getattr(datamodule, "name", None), getattr(datamodule, "category", None)
                target = generate_output_filename(path, output_dir, *names)
            with TemporaryDirectory() as temporary:
                if path and is_deep(path):
                    # The picture is drawn on the file, which would be white.
                    item.image_path = f"{temporary}/image.png"
                    to_pil_image(read_image(path, white_of(category))).save(item.image_path)
                picture = self.visualize(item)
            if isinstance(picture, Image):
                # The partial file has another ending.
                kind = registered_extensions()[target.suffix.lower()]
                with replacing(target) as partial:
                    picture.save(partial, format=kind)
