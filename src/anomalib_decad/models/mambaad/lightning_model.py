# SPDX-License-Identifier: Apache-2.0
"""MambaAD with decoupling, as an anomalib model."""

from collections.abc import Sequence
from typing import Any

from anomalib.models.components import AnomalibModule
from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode, AnomalyMapGenerator
from torch import nn

from anomalib_decad.components.encoders import CNNEncoder, ViTPyramid
from anomalib_decad.models.decoupled import DecoupledMixin
from anomalib_decad.models.decoupled_model import DistillationModel, FeatureMSELoss
from anomalib_decad.models.mambaad.bottleneck import HalfFPN
from anomalib_decad.models.mambaad.decoder import MambaDecoder
from anomalib_decad.ranges import check_range

__all__ = ["DecoupledMambaAD"]

_LOSS_WEIGHT = 5.0
_SCALES = 8  # positions of a pyramid's finest map for one of the embedding, along a side


class DecoupledMambaAD(DecoupledMixin, AnomalibModule):
    """MambaAD, whose bottleneck embedding is decoupled.

    As reverse distillation, but the decoder is one of selective state spaces, which scan the feature maps along Hilbert
    curves in eight directions, beside convolutions that see the neighborhood. On a GPU the scan uses the package
    ``mamba_ssm`` if that is installed.

    Args:
        encoder (str): Name of a timm convolutional network whose stages double their channels, or of a vision
            transformer. The stages 1, 2 and 3 are distilled (strides of 4, 8 and 16 pixels).
            Defaults to ``"resnet34"``.
        depths (Sequence[int]): State space blocks of the decoder's four stages, from the coarsest; multiples of 2 or 3.
            Defaults to ``(3, 4, 6, 3)``.
        num_directions (int): Directions that a state space block scans in: 2, 4 or 8. Defaults to ``8``.
        learning_rate (float): Learning rate of AdamW; it falls to a tenth after 80 % of the training.
            Defaults to ``0.005``, as in the paper.
        weight_decay (float): Weight decay of AdamW. Defaults to ``1e-4``, as in the paper.
        **kwargs (Any): Arguments of :class:`DecoupledMixin`, whose errors are raised.

    Reference:
        He et al.: MambaAD: Exploring State Space Models for Multi-class Unsupervised Anomaly Detection. NeurIPS 2024.
    """

    architecture = DecoupledMixin.architecture | {"depths", "num_directions"}
    stages = (1, 2, 3)
    pyramid_channels = (64, 128, 256)  # those of a ResNet-34

    def __init__(
        self,
        encoder: str = "resnet34",
        depths: Sequence[int] = (3, 4, 6, 3),
        num_directions: int = 8,
        learning_rate: float = 0.005,
        weight_decay: float = 1e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)

    def make(self, encoder: CNNEncoder | ViTPyramid, size: tuple[int, int]) -> tuple[DistillationModel, nn.Module]:
        """Make the plain method from ``self.hparams``."""
        depths = self.hparams["depths"]
        check_range(len(depths) == 4, "depths", "four numbers", list(depths))
        stride = _SCALES * encoder.finest_stride
        grid = (round(size[0] / stride), round(size[1] / stride))
        bottleneck = HalfFPN(encoder.channels)
        decoder = MambaDecoder(2 * encoder.channels[-1], grid, depths, self.hparams["num_directions"])
        anomaly_map = AnomalyMapGenerator(size, mode=AnomalyMapGenerationMode.ADD)
        return DistillationModel(encoder, bottleneck, decoder, anomaly_map), FeatureMSELoss(_LOSS_WEIGHT)
