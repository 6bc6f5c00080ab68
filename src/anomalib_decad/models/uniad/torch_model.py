# SPDX-License-Identifier: Apache-2.0
"""UniAD with decoupling, as a torch module."""

import torch
from torch import nn
from torch.nn import functional

from anomalib_decad.components import CategoryPrediction
from anomalib_decad.components.encoders import CNNEncoder, ViTPyramid
from anomalib_decad.models.decoupled_model import DecoupledModel
from anomalib_decad.models.uniad.transformer import PositionEmbedding, QueryDecoder, TransformerEncoder
from anomalib_decad.ranges import check_range

__all__ = ["DecoupledUniADModel"]

_POOLING = 16  # side of the square that the anomaly map is averaged over for the image score, in pixels


class DecoupledUniADModel(DecoupledModel):
    """UniAD, which can be decoupled between the transformer's encoder and decoder.

    The arguments that are not listed, and the errors, are those of :class:`DecoupledUniAD`.

    Args:
        encoder (CNNEncoder | ViTPyramid): Gives the feature maps.
        image_size (tuple[int, int]): Height and width of the images in pixels.
    """

    embedding = "transformer_encoder"

    def __init__(
        self,
        encoder: CNNEncoder | ViTPyramid,
        image_size: tuple[int, int],
        hidden_dim: int = 256,
        num_layers: int = 4,
        num_heads: int = 8,
        neighbors: int = 7,
        jitter: float = 20.0,
    ) -> None:
        super().__init__(encoder, hidden_dim)
        fits = not (hidden_dim % num_heads or hidden_dim % 2)
        check_range(fits, "hidden_dim", "even and a multiple of num_heads", f"{hidden_dim} and {num_heads}")
        check_range(jitter >= 0, "jitter", "at least 0", jitter)
        self.jitter = jitter
        self.grid = (image_size[0] // encoder.strides[-1], image_size[1] // encoder.strides[-1])
        channels = sum(encoder.channels)
        self.positions = PositionEmbedding(self.grid, hidden_dim)
        self.input_projection = nn.Linear(channels, hidden_dim)
        self.transformer_encoder = TransformerEncoder(self.grid, hidden_dim, num_layers, num_heads, neighbors)
        self.transformer_decoder = QueryDecoder(self.grid, hidden_dim, num_layers, num_heads, neighbors)
        self.output_projection = nn.Linear(hidden_dim, channels)
        for part in (self.input_projection, self.transformer_encoder, self.transformer_decoder, self.output_projection):
            for matrix in (parameter for parameter in part.parameters() if parameter.ndim > 1):
                nn.init.xavier_uniform_(matrix)

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]] | CategoryPrediction:
        """Run the model, as :meth:`DistillationModel.forward`, with one joined map (B, channels, rows, columns)."""
        encoded = self.encoder(images)
        features = torch.cat([_resize(feature, self.grid) for feature in encoded.values()], dim=1)
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
        anomaly_map = _resize(errors, size)
        pooled = functional.avg_pool2d(anomaly_map, min(_POOLING, *size), stride=1)
        return CategoryPrediction(
            pred_score=pooled.amax(dim=(1, 2, 3)), anomaly_map=anomaly_map, category=self.recognizer(encoded)
        )

    def _with_jitter(self, tokens: torch.Tensor) -> torch.Tensor:
        """Add noise in proportion to each token's norm (UniAD, section 3.3)."""
        norms = tokens.norm(dim=-1, keepdim=True) / tokens.shape[-1]
        return tokens + self.jitter * norms * torch.randn_like(tokens)


def _resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return functional.interpolate(maps, size=size, mode="bilinear", align_corners=True)
