# SPDX-License-Identifier: Apache-2.0
"""The images of a training dataset, and the encoder of their features."""

import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from anomalib_decad.components.encoders import ViTEncoder
from anomalib_decad.feature_cache.dataset import FeatureCode

__all__ = ["FeatureSource"]

_FORMAT = 2  # part of the key; to be raised with each change of how images are read or encoded
_CODE_IMAGES = 32  # that choose the code of the features
_TRIALS = 8  # in which an augmentation with a generator of its own shows that it is random


class FeatureSource:
    """The images of a dataset, and the encoder of their features.

    Args:
        module (AnomalibModule): The model, whose encoder and pre-processor are used.
        dataset (Any): anomalib dataset of images.
        batch_size (int): Images that are encoded at once.
        num_workers (int): Processes that read images; 0 for none but this one.
        trainer (Trainer | None): The trainer whose precision is used; ``None`` for float32.
    """

    def __init__(
        self,
        module: AnomalibModule,
        dataset: Any,
        batch_size: int,
        num_workers: int = 0,
        trainer: Trainer | None = None,
    ) -> None:
        self.module, self.dataset, self.trainer = module, dataset, trainer
        self.batch_size, self.num_workers = batch_size, num_workers
        self.encoder = cast("ViTEncoder", module.model.encoder)
        self.encoder.load_weights()
        self.transform = getattr(module.pre_processor, "transform", None) or (lambda images: images)
        self.grid = self.encoder.grid(*self.prepare(dataset[0].image).shape[-2:])
        self.shape = len(dataset), len(self.encoder.layers), self.grid[0] * self.grid[1], self.encoder.dim

    def prepare(self, image: torch.Tensor) -> torch.Tensor:
        """Apply the pre-processor to an image of shape (3, H, W)."""
        return self.transform(image.to(self.module.device)[None])[0]

    def check(self) -> None:
        """Refuse images that are not the same each time.

        Raises:
            ValueError: If preparing an image draws random numbers, or twice gives two different ones.
        """
        before = _random_states()
        images = [self.prepare(self.dataset[0].image) for _ in range(_TRIALS)]
        # An augmentation that is rare still draws a number each time, for whether it is its turn.
        if _random_states() != before or not all(torch.equal(image, images[0]) for image in images):
            msg = "feature_cache: training images are augmented at random: remove that, or train with feature_cache=off"
            raise ValueError(msg)

    def key(self) -> str:
        """Name all that the features depend on, by 32 hexadecimal digits.

        A transform need not say all about itself: so some images are looked at, too, as the encoder sees them.
        """
        files = [(path.resolve(), path.stat()) for path in map(Path, self.dataset.samples.image_path)]
        weights = self.encoder.state_dict()
        settings = (
            _FORMAT, self.encoder.name, self.encoder.layers, self.shape, list(weights), repr(self.module.pre_processor),
            self.trainer.precision if self.trainer else "32-true", type(self.dataset),
            getattr(self.dataset, "white_levels", None), getattr(self.dataset, "augmentations", None),
            [(str(path), status.st_size, status.st_mtime_ns) for path, status in files],
        )  # fmt: skip
        digest = hashlib.sha256(repr(settings).encode())
        seen = [self.prepare(self.dataset[index].image) for index in {0, len(files) // 2, len(files) - 1}]
        for tensor in (*seen, *weights.values()):
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    def encode(self, items: Sequence[Any]) -> torch.Tensor:
        """Encode items of the dataset as a training step would, to features of shape (B, layers, N, dim)."""
        images = torch.stack([self.prepare(item.image) for item in items])
        with self.trainer.precision_plugin.forward_context() if self.trainer else nullcontext():
            return torch.stack(self.encoder(images), dim=1)

    def build(self, write: Callable[[memoryview], Any], is_shown: bool = True) -> FeatureCode:
        """Write the encoded features of all images, float16, one batch after the other, and give their code."""
        count = len(self.dataset)
        chosen = np.linspace(0, count - 1, min(_CODE_IMAGES, count)).astype(int).tolist()
        code = FeatureCode.from_features(torch.cat([self.encode(items) for items in self._read(chosen)]))
        batches = self._read(range(count), self.num_workers)
        for items in tqdm(batches, "Encoding images", disable=not is_shown, mininterval=1.0):
            write(code.encode(self.encode(items)).cpu().numpy().data)
        return code

    def _read(self, indices: Sequence[int], num_workers: int = 0) -> DataLoader:
        subset: Subset = Subset(self.dataset, indices)
        return DataLoader(subset, self.batch_size, num_workers=num_workers, collate_fn=list)


def _random_states() -> tuple[bytes, Any, str]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state())
