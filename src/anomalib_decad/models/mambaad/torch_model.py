# SPDX-License-Identifier: Apache-2.0
"""MambaAD with decoupling, as a torch module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode, AnomalyMapGenerator
from torch import nn

from anomalib_decad.components import CategoryPrediction, CategoryRecognizer, attach, create_encoder
from anomalib_decad.models.decoupled_model import DecoupledModel
from anomalib_decad.models.mambaad.bottleneck import HalfFPN
from anomalib_decad.models.mambaad.decoder import MambaDecoder
from anomalib_decad.models.mambaad.scan_order import Curve
from anomalib_decad.ranges import check_range

__all__ = ["DecoupledMambaADModel"]

#: Stages of the encoder that are distilled: strides of 4, 8 and 16 pixels.
_STAGES = (1, 2, 3)

#: Channels of the pyramid that a vision transformer's outputs become: those of a ResNet-34.
_TRANSFORMER_CHANNELS = (64, 128, 256)

#: Pixels of a pyramid's finest map for one of the embedding, along a side.
_SCALES = 8


class DecoupledMambaADModel(DecoupledModel):
    """MambaAD, with decoupling of the bottleneck's embedding.

    Args:
        encoder (str): Name of a timm convolutional network whose stages double their channels, or of a vision
            transformer, whose outputs become a pyramid with the channels of a ResNet-34.
        encoder_weights (str | Path | None): Local file with its weights; ``None`` for timm's pretrained weights.
        layers (Sequence[int] | None): Three stages of a convolutional network, counted from 0, or layers of a
            transformer, counted from 1; ``None`` for the paper's, or the layers 3, 6 and 9.
        image_size (tuple[int, int]): Height and width of the images in pixels.
        depths (Sequence[int]): State space blocks of the decoder's four stages, from the coarsest.
        num_directions (int): Directions of a scan: 2, 4 or 8.
        scan (Curve): Curve of the scan.
        decouple (bool): Whether anomalies are synthesized and removed; without, it is MambaAD.
        pretrained (bool): Whether the encoder gets weights at all; a random one is good for tests only.
        **kwargs (Any): Further arguments of :class:`EmbeddingDecoupling`.

    Raises:
        ValueError: If an argument is out of its range.
        FileNotFoundError: If ``encoder_weights`` is no file.

    Reference:
        He et al.: MambaAD: Exploring State Space Models for Multi-class Unsupervised Anomaly Detection. NeurIPS 2024.
    """

    def __init__(
        self,
        encoder: str = "resnet34",
        encoder_weights: str | Path | None = None,
        layers: Sequence[int] | None = None,
        image_size: tuple[int, int] = (256, 256),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_directions: int = 8,
        scan: Curve = "hilbert",
        decouple: bool = True,
        pretrained: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_range(len(depths) == 4, "depths", "four numbers", list(depths))
        self.encoder = create_encoder(encoder, layers, encoder_weights, pretrained, _STAGES, _TRANSFORMER_CHANNELS)
        self.encoder.check(*image_size)
        self.recognizer = CategoryRecognizer()
        self.bottleneck: nn.Module = HalfFPN(self.encoder.channels)
        dim = 2 * self.encoder.channels[-1]
        stride = _SCALES * self.encoder.finest_stride
        grid = (round(image_size[0] / stride), round(image_size[1] / stride))
        self.decoder = MambaDecoder(dim, grid, depths, num_directions, scan)
        self.anomaly_map_generator = AnomalyMapGenerator(image_size, mode=AnomalyMapGenerationMode.ADD)
        if decouple:
            attach(self, "bottleneck", dim, **kwargs)

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]] | CategoryPrediction:
        """Run the model.

        Args:
            images (torch.Tensor): Normalized images of shape (B, 3, H, W), of the model's size.

        Returns:
            tuple[list[torch.Tensor], list[torch.Tensor]] | CategoryPrediction: In training mode the encoder's three
                maps and their reconstructions; in eval mode ``pred_score`` of shape (B,), ``anomaly_map`` of shape
                (B, 1, H, W) and ``category`` of shape (B,).
        """
        features = list(self.encoder(images).values())
        reconstructions = self.decoder(self.bottleneck(features))
        if self.training:
            return features, reconstructions
        anomaly_map = self.anomaly_map_generator(features, [maps.float() for maps in reconstructions])
        return CategoryPrediction(
            pred_score=anomaly_map.amax(dim=(1, 2, 3)), anomaly_map=anomaly_map, category=self.recognizer(features)
        )
