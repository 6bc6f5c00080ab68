# SPDX-License-Identifier: Apache-2.0
"""What the torch modules of methods with decoupling share."""

import copy
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from anomalib_decad.components import CategoryPrediction, CategoryRecognizer, EmbeddingDecoupling

__all__ = ["DecoupledModel", "DistillationModel"]


class DecoupledModel(nn.Module):
    """Base of the torch modules of methods with decoupling: a frozen encoder, and a copy for inference.

    In training mode a subclass returns (features, reconstructions), lists of tensors, and in eval mode a
    :class:`CategoryPrediction`.
    """

    encoder: Any  # a CNNEncoder or a ViTPyramid
    recognizer: CategoryRecognizer

    @property
    def decoupling(self) -> EmbeddingDecoupling | None:
        """The decoupling, unless the method is plain."""
        found = (module for module in self.modules() if isinstance(module, EmbeddingDecoupling))
        return next(found, None)

    @property
    def keep_in_float32(self) -> list[str]:
        """Names of the parts that quantization leaves in floating point: removal is only faithful if it is accurate."""
        parts = {name for name, module in self.named_modules() if isinstance(module, EmbeddingDecoupling)}
        return [f"{name}.decoupler" for name in sorted(parts)]

    def fused(self, image_size: tuple[int, int] | None) -> Self:
        """Copy the model for inference, faster and the same within rounding.

        Args:
            image_size (tuple[int, int] | None): Height and width of the images in pixels.

        Returns:
            Self: The copy, in eval mode.

        Raises:
            EncoderWeightsError: If the encoder's weights had to be loaded and could not.
        """
        model = copy.deepcopy(self).eval()
        if image_size is not None:
            model.encoder.fuse(*image_size)
        if model.decoupling:
            model.decoupling.fuse()
        return model.requires_grad_(False)


class DistillationModel(DecoupledModel):
    """Base of the methods whose ``decoder`` distils the encoder's maps from the embedding of a ``bottleneck``."""

    bottleneck: Any
    decoder: Any
    anomaly_map_generator: Any

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]] | CategoryPrediction:
        """Run the model.

        Args:
            images (torch.Tensor): Normalized images of shape (B, 3, H, W), of the model's size.

        Returns:
            tuple[list[torch.Tensor], list[torch.Tensor]] | CategoryPrediction: In training mode the encoder's maps and
                their reconstructions; in eval mode ``pred_score`` of shape (B,), ``anomaly_map`` of shape
                (B, 1, H, W) and ``category`` of shape (B,).
        """
        features = list(self.encoder(images).values())
        reconstructions = self.decoder(self.bottleneck(features))
        if self.training:
            return features, reconstructions
        anomaly_map = self.anomaly_map_generator(features, reconstructions)
        return CategoryPrediction(
            pred_score=anomaly_map.amax(dim=(1, 2, 3)), anomaly_map=anomaly_map, category=self.recognizer(features)
        )
