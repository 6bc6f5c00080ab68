# SPDX-License-Identifier: Apache-2.0
"""MambaAD with decoupling, as a torch module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode, AnomalyMapGenerator
from torch import nn

from anomalib_decad.components import CategoryRecognizer, attach, create_encoder
from anomalib_decad.models.decoupled_model import DistillationModel
from anomalib_decad.models.mambaad.bottleneck import HalfFPN
from anomalib_decad.models.mambaad.decoder import MambaDecoder
from anomalib_decad.models.mambaad.scan_order import Curve
from anomalib_decad.ranges import check_range

__all__ = ["DecoupledMambaADModel"]

_STAGES = (1, 2, 3)  # of the encoder that are distilled: strides of 4, 8 and 16 pixels
_TRANSFORMER_CHANNELS = (64, 128, 256)  # of the pyramid of a vision transformer: those of a ResNet-34
_SCALES = 8  # positions of a pyramid's finest map for one of the embedding, along a side


class DecoupledMambaADModel(DistillationModel):
    """MambaAD, with decoupling of the bottleneck's embedding.

    The arguments that are not listed, and the errors, are those of :class:`DecoupledMambaAD`.

    Args:
        pretrained (bool): Whether the encoder gets weights at all; random ones are for tests only.
        **kwargs (Any): Further arguments of :class:`EmbeddingDecoupling`.
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
