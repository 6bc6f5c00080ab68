# SPDX-License-Identifier: Apache-2.0
"""What the torch modules of methods with decoupling share."""

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional
from typing_extensions import Self

from anomalib_decad.components import CategoryPrediction, CategoryRecognizer, EmbeddingDecoupling
from anomalib_decad.components.encoders import CNNEncoder, ViTPyramid

__all__ = ["DecoupledModel", "DistillationModel", "FeatureMSELoss"]


class DecoupledModel(nn.Module):
    """Base of the torch modules of methods that can be decoupled: a frozen encoder, and a copy for inference.

    In training mode a subclass returns (features, reconstructions), lists of tensors, and in eval mode a
    :class:`CategoryPrediction`. It is the plain method until :func:`attach` decouples the output of its layer
    :attr:`embedding`.

    Args:
        encoder (CNNEncoder | ViTPyramid): Gives the feature maps.
        embedding_dim (int): Channels of the embedding.
    """

    #: Name of the layer whose output is the embedding.
    embedding: ClassVar[str]

    def __init__(self, encoder: CNNEncoder | ViTPyramid, embedding_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.embedding_dim = embedding_dim
        self.recognizer = CategoryRecognizer()

    @property
    def decoupling(self) -> EmbeddingDecoupling | None:
        """The decoupling, unless the method is plain."""
        return getattr(getattr(self, self.embedding), "decoupling", None)

    @property
    def keep_in_float32(self) -> list[str]:
        """Names of the parts that quantization leaves in floating point: removal is only faithful if it is accurate."""
        return [f"{self.embedding}.decoupling.decoupler"] if self.decoupling else []

    def fused(self, image_size: tuple[int, int] | None) -> Self:
        """Copy the model for inference, in eval mode, faster and the same within rounding.

        Args:
            image_size (tuple[int, int] | None): Height and width of the images in pixels.

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
    """Distils the encoder's maps from the embedding of a bottleneck: what cannot be reproduced is an anomaly.

    Args:
        encoder (CNNEncoder | ViTPyramid): Gives the feature maps.
        bottleneck (nn.Module): Joins them to an embedding, which has twice the channels of the last map.
        decoder (nn.Module): Gives maps of the same shapes.
        anomaly_map (nn.Module): Compares both.
    """

    embedding = "bottleneck"

    def __init__(
        self, encoder: CNNEncoder | ViTPyramid, bottleneck: nn.Module, decoder: nn.Module, anomaly_map: nn.Module
    ) -> None:
        super().__init__(encoder, 2 * encoder.channels[-1])
        self.bottleneck = bottleneck
        self.decoder = decoder
        self.anomaly_map_generator = anomaly_map

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


class FeatureMSELoss(nn.Module):
    """Sum over feature maps of the mean squared error of their reconstruction.

    Args:
        weight (float): Factor of the sum: 1 in UniAD, 5 in MambaAD. Defaults to ``1.0``.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, features: Sequence[torch.Tensor], reconstructions: Sequence[torch.Tensor]) -> torch.Tensor:
        """Compute the loss, a scalar, of feature maps of any shapes and their reconstructions of the same shapes."""
        pairs = zip(reconstructions, features, strict=True)
        return self.weight * torch.stack([functional.mse_loss(a.float(), b.float()) for a, b in pairs]).sum()
