# SPDX-License-Identifier: Apache-2.0
"""The baseline that is hard to beat on a small budget: the distance to the nearest normal patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torch.nn import functional

from anomalib_decad.components import ViTEncoder
from anomalib_decad.models.decad.anomaly_map import AnomalyMapGenerator

__all__ = ["NearestNeighbor"]


class NearestNeighborModel(nn.Module):
    """Euclidean distance of the mean of layer-normalized feature maps to the nearest of a sample of normal patches.

    Args:
        encoder (str): A DINOv2 of timm.
        layers (Sequence[int]): Encoder layers, counted from 1.
    """

    bank: torch.Tensor

    def __init__(self, encoder: str, layers: Sequence[int]) -> None:
        super().__init__()
        self.encoder = ViTEncoder(encoder, layers)
        self.anomaly_map_generator = AnomalyMapGenerator()
        self.register_buffer("bank", torch.empty(0, self.encoder.dim))

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Compute embeddings of shape (B, N, dim) of images of shape (B, 3, H, W)."""
        return torch.stack([functional.layer_norm(output, output.shape[-1:]) for output in self.encoder(images)]).mean(
            0
        )

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Compute anomaly maps and scores."""
        size = images.shape[-2:]
        # A product of matrices, which is counted, too.
        norms = self.bank.square().sum(1)
        squares = [x.square().sum(1) + (norms - 2 * x @ self.bank.T).amin(1) for x in self.embed(images)]
        errors = torch.stack(squares).clamp(min=0).sqrt()
        maps, scores = self.anomaly_map_generator.maps_and_scores(errors, self.encoder.grid(*size), tuple(size))
        return InferenceBatch(pred_score=scores, anomaly_map=maps)


class NearestNeighbor(MemoryBankMixin, AnomalibModule):
    """The baseline as an anomalib model.

    Args:
        encoder (str): A DINOv2 of timm.
        layers (Sequence[int]): Encoder layers, counted from 1.
        num_patches (int): Size of the memory bank, drawn from all patches of the training images.
        **kwargs (Any): Pre- and post-processor, evaluator and visualizer.
    """

    def __init__(self, encoder: str, layers: Sequence[int], num_patches: int = 30_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = NearestNeighborModel(encoder, layers)
        self.num_patches = num_patches
        self.collected: list[torch.Tensor] = []

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing is optimized."""

    @property
    def learning_type(self) -> LearningType:
        """Only normal images are trained with."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the images."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Collect the patches of a batch."""
        del args, kwargs
        with torch.no_grad():
            self.collected.append(self.model.embed(batch.image).flatten(0, 1))
        return torch.tensor(0.0, requires_grad=True, device=self.device)

    def fit(self) -> None:
        """Draw the memory bank."""
        patches = torch.cat(self.collected)
        self.model.bank = patches[torch.randperm(len(patches))[: self.num_patches]].clone()
        self.collected.clear()

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Predict a batch."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())
