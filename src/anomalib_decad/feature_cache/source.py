# SPDX-License-Identifier: Apache-2.0
"""The images of a training dataset, and the encoder of their features."""

import random
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, Subset

from anomalib_decad.components.encoders import ViTEncoder
from anomalib_decad.feature_cache.codec import FeatureCode
from anomalib_decad.feature_cache.store import fingerprint
from anomalib_decad.progress import showing_progress

__all__ = ["FeatureSource"]

# Images that choose the code of the features.
_CODE_IMAGES = 32
# An image is prepared so many times to find out whether that is random, by a generator of its own.
_TRIALS = 8


class FeatureSource:
    """The images of a dataset, and the encoder of their features.

    Args:
        module (AnomalibModule): The model, whose encoder and pre-processor are used.
        dataset (Any): anomalib dataset of images.
        batch_size (int): Images that are encoded at once.
        num_workers (int): Processes that read images.
            Defaults to ``0``: none but this one.
        trainer (Trainer | None): The trainer whose precision is used.
            Defaults to ``None``: float32.
    """

    def __init__(
        self,
        module: AnomalibModule,
        dataset: Any,
        batch_size: int,
        num_workers: int = 0,
        trainer: Trainer | None = None,
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.encoder = cast("ViTEncoder", module.model.encoder)
        self.encoder.load_weights()
        pre_processor = cast("PreProcessor | None", module.pre_processor)
        self.transform = pre_processor.transform if pre_processor else None
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        first = self.prepare(dataset[0].image)
        rows, columns = self.encoder.grid(*first.shape[-2:])
        self.grid = rows, columns
        self.shape = (len(dataset), len(self.encoder.layers), rows * columns, self.encoder.dim)

    def prepare(self, image: torch.Tensor) -> torch.Tensor:
        """Apply the pre-processor to an image of shape (3, H, W)."""
        image = image.to(self.module.device)[None]
        return (self.transform(image) if self.transform else image)[0]

    def check(self) -> None:
        """Refuse images that are not the same each time.

        Raises:
            ValueError: If preparing an image draws random numbers, or twice gives two different ones.
        """
        before = _random_states()
        first = self.prepare(self.dataset[0].image)
        # An augmentation that is rare still draws a number each time, for whether it is its turn.
        draws = _random_states() != before
        for _ in range(_TRIALS):
            again = self.prepare(self.dataset[0].image)
            if draws or again.shape != first.shape or not torch.equal(again, first):
                msg = (
                    "feature_cache: training images are augmented at random, so their features cannot be kept: remove "
                    "the augmentations, or train with feature_cache=off"
                )
                raise ValueError(msg)

    def key(self) -> str:
        """Name all that the features depend on.

        A transform need not say all about itself: so some images are looked at, too, as the encoder sees them.
        """
        paths = [Path(path) for path in self.dataset.samples.image_path]
        encoder = self.encoder
        preparation = repr(self.transform), repr(getattr(self.dataset, "augmentations", None))
        precision = self.trainer.precision if self.trainer else "32-true"
        whites = getattr(self.dataset, "whites", None)  # of images with more than 8 bits
        settings = encoder.name, encoder.layers, self.shape, precision, repr(whites)
        last = len(self.dataset) - 1
        seen = [self.prepare(self.dataset[index].image) for index in sorted({0, last // 2, last})]
        return fingerprint(*settings, preparation, *seen, dict(encoder.state_dict()), *paths)

    def choose_code(self) -> FeatureCode:
        """Choose the code of the features by some images of all parts of the dataset."""
        chosen = np.linspace(0, len(self.dataset) - 1, min(_CODE_IMAGES, len(self.dataset))).astype(int)
        parts = np.array_split(chosen, -(-len(chosen) // self.batch_size))
        features = [self.encode([self.dataset[int(index)].image for index in part]) for part in parts]
        return FeatureCode.from_features(torch.cat(features))

    def encode(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Encode images as a training step would: in the trainer's precision.

        Args:
            images (Sequence[torch.Tensor]): Images of shape (3, H, W).

        Returns:
            torch.Tensor: Features of shape (B, layers, N, dim).
        """
        batch = torch.stack([self.prepare(image) for image in images])
        with self.trainer.precision_plugin.forward_context() if self.trainer else nullcontext():
            return torch.stack(self.encoder(batch), dim=1)

    def encode_into(self, target: np.ndarray, indices: Sequence[int], code: FeatureCode) -> None:
        """Write the features of some images to their places in an array, and show how far it is."""
        loader = DataLoader(
            cast("Dataset", Subset(self.dataset, indices)),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=_only_images,
            generator=torch.Generator(),
        )
        device = self.module.device
        code = FeatureCode(code.offset.to(device), code.scale.to(device))
        done = 0
        with showing_progress("Encoding images", self.trainer is None or self.trainer.is_global_zero) as report:
            for images in loader:
                codes = code.encode(self.encode(images)).cpu().numpy()
                target[[indices[done + row] for row in range(len(codes))]] = codes
                done += len(codes)
                report(done / len(indices))


def _only_images(items: Sequence[Any]) -> list[torch.Tensor]:
    return [item.image for item in items]


def _random_states() -> tuple[bytes, Any, str]:
    """Give the states of the random number generators that augmentations use."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state())
