# SPDX-License-Identifier: Apache-2.0
"""UniAD with decoupling, as a torch module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from anomalib_decad.components import CategoryPrediction, CategoryRecognizer, attach, create_encoder
from anomalib_decad.models.decoupled_model import DecoupledModel
from anomalib_decad.models.uniad.transformer import PositionEmbedding, QueryDecoder, TransformerEncoder

__all__ = ["DecoupledUniADModel"]

#: Stages of the encoder whose maps are reconstructed: strides of 2, 4, 8 and 16 pixels.
_STAGES = (0, 1, 2, 3)

#: Side of the square that the anomaly map is averaged over for the image score, in pixels.
_POOLING = 16


class DecoupledUniADModel(DecoupledModel):
    """UniAD, with decoupling between the transformer's encoder and decoder.

    Args:
        encoder (str): Name of a timm convolutional network or vision transformer.
        encoder_weights (str | Path | None): Local file with its weights; ``None`` for timm's pretrained weights.
        layers (Sequence[int] | None): Stages of a convolutional network, counted from 0, or layers of a transformer,
            counted from 1; ``None`` for the paper's, or the layers 3, 6 and 9.
        image_size (tuple[int, int]): Height and width of the images in pixels.
        hidden_dim (int): Channels of the transformer; a multiple of ``num_heads``, even.
        num_layers (int): Layers of the transformer's encoder, and of its decoder.
        num_heads (int): Attention heads of a layer.
        neighbors (int): Side of the square around a position that attention is masked in, in positions; odd.
        jitter (float): Scale of the noise that is added to the features in training; 0 for none.
        decouple (bool): Whether anomalies are synthesized and removed; without, it is UniAD.
        pretrained (bool): Whether the encoder gets weights at all; a random one is good for tests only.
        **kwargs (Any): Further arguments of :class:`EmbeddingDecoupling`.

    Raises:
        ValueError: If an argument is out of its range.
        FileNotFoundError: If ``encoder_weights`` is no file.

    Reference:
        You et al.: A Unified Model for Multi-class Anomaly Detection. NeurIPS 2022.
    """

    def __init__(
        self,
        encoder: str = "efficientnet_b4",
        encoder_weights: str | Path | None = None,
        layers: Sequence[int] | None = None,
        image_size: tuple[int, int] = (224, 224),
        hidden_dim: int = 256,
        num_layers: int = 4,
        num_heads: int = 8,
        neighbors: int = 7,
        jitter: float = 20.0,
        decouple: bool = True,
        pretrained: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if hidden_dim % num_heads or hidden_dim % 2:
            msg = f"hidden_dim must be even and a multiple of num_heads, got {hidden_dim} and {num_heads}"
            raise ValueError(msg)
        if jitter < 0:
            msg = f"jitter must not be negative, got {jitter}"
            raise ValueError(msg)
        self.jitter = jitter
        self.encoder = create_encoder(encoder, layers, encoder_weights, pretrained, _STAGES)
        self.encoder.check(*image_size)
        self.recognizer = CategoryRecognizer()
        self.grid = (image_size[0] // self.encoder.strides[-1], image_size[1] // self.encoder.strides[-1])
        channels = sum(self.encoder.channels)
        self.positions = PositionEmbedding(self.grid, hidden_dim)
        self.input_projection = nn.Linear(channels, hidden_dim)
        self.transformer_encoder = TransformerEncoder(self.grid, hidden_dim, num_layers, num_heads, neighbors)
        self.transformer_decoder = QueryDecoder(self.grid, hidden_dim, num_layers, num_heads, neighbors)
        self.output_projection = nn.Linear(hidden_dim, channels)
        for part in (self.input_projection, self.transformer_encoder, self.transformer_decoder, self.output_projection):
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        if decouple:
            attach(self, "transformer_encoder", hidden_dim, **kwargs)

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]] | CategoryPrediction:
        """Run the model.

        Args:
            images (torch.Tensor): Normalized images of shape (B, 3, H, W), of the model's size.

        Returns:
            tuple[list[torch.Tensor], list[torch.Tensor]] | CategoryPrediction: In training mode the joined feature map
                and its reconstruction, both of shape (B, channels, rows, columns); in eval mode ``pred_score`` of
                shape (B,), ``anomaly_map`` of shape (B, 1, H, W) and ``category`` of shape (B,).
        """
        encoded = self.encoder(images)
        maps = [
            functional.interpolate(feature, size=self.grid, mode="bilinear", align_corners=True)
            for feature in encoded.values()
        ]
        features = torch.cat(maps, dim=1)
        tokens = features.flatten(2).mT
        if self.training:
            tokens = self._with_jitter(tokens)
        positions = self.positions()
        embeddings = self.transformer_encoder(self.input_projection(tokens), positions)
        decoded = self.output_projection(self.transformer_decoder(embeddings, positions))
        reconstruction = decoded.mT.unflatten(2, self.grid)
        if self.training:
            return [features], [reconstruction]
        errors = (features - reconstruction).float().square().sum(1, keepdim=True).sqrt()
        size = (images.shape[-2], images.shape[-1])
        anomaly_map = functional.interpolate(errors, size=size, mode="bilinear", align_corners=True)
        pooled = functional.avg_pool2d(anomaly_map, min(_POOLING, *size), stride=1)
        return CategoryPrediction(
            pred_score=pooled.amax(dim=(1, 2, 3)), anomaly_map=anomaly_map, category=self.recognizer(encoded)
        )

    def _with_jitter(self, tokens: torch.Tensor) -> torch.Tensor:
        """Add noise in proportion to each token's norm (UniAD, section 3.3)."""
        norms = tokens.norm(dim=-1, keepdim=True) / tokens.shape[-1]
        return tokens + self.jitter * norms * torch.randn_like(tokens)
