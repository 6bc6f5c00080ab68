# SPDX-License-Identifier: Apache-2.0
"""Reverse distillation with decoupling, as an anomalib model."""

from typing import Any

from anomalib.models.components import AnomalibModule
from anomalib.models.components.backbone import get_decoder
from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode, AnomalyMapGenerator
from anomalib.models.image.reverse_distillation.components import get_bottleneck_layer
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
from torch import nn
from torch.optim import Adam

from anomalib_decad.components.encoders import CNNEncoder, ViTPyramid
from anomalib_decad.models.decoupled import DecoupledMixin
from anomalib_decad.models.decoupled_model import DistillationModel

__all__ = ["DecoupledReverseDistillation"]

# A vision transformer's outputs become a pyramid with the channels of this network, which gives bottleneck and decoder.
_TRANSFORMER_DECODER, _TRANSFORMER_CHANNELS = "resnet50", (256, 512, 1024)


class DecoupledReverseDistillation(DecoupledMixin, AnomalibModule):
    """anomalib's reverse distillation (RD4AD), whose bottleneck embedding is decoupled.

    A decoder distils a frozen encoder's feature maps from a bottleneck embedding of them; what it cannot reproduce is
    an anomaly. Between bottleneck and decoder, what is abnormal is removed from the embedding. Bottleneck, decoder,
    anomaly map and score are anomalib's own.

    Args:
        encoder (str): Name of a ResNet that anomalib has a decoder for, or of a timm vision transformer. Its stages 1,
            2 and 3 are distilled (strides of 4, 8 and 16 pixels).
            Defaults to ``"wide_resnet50_2"``.
        anomaly_map_mode (AnomalyMapGenerationMode): How the maps of the stages are joined.
            Defaults to ``AnomalyMapGenerationMode.ADD``.
        learning_rate (float): Learning rate of Adam, for bottleneck and decoder.
            Defaults to ``0.005``, as in the paper and in anomalib.
        **kwargs (Any): Arguments of :class:`DecoupledMixin`, whose errors are raised.

    Reference:
        Deng and Li: Anomaly Detection via Reverse Distillation from One-Class Embedding. CVPR 2022.
    """

    architecture = DecoupledMixin.architecture | {"anomaly_map_mode"}
    stages = (1, 2, 3)
    pyramid_channels = _TRANSFORMER_CHANNELS

    def __init__(
        self,
        encoder: str = "wide_resnet50_2",
        anomaly_map_mode: AnomalyMapGenerationMode = AnomalyMapGenerationMode.ADD,
        learning_rate: float = 0.005,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)

    def make(self, encoder: CNNEncoder | ViTPyramid, size: tuple[int, int]) -> tuple[DistillationModel, nn.Module]:
        """Make the plain method from ``self.hparams``."""
        name = _TRANSFORMER_DECODER if isinstance(encoder, ViTPyramid) else encoder.name.partition(".")[0]
        try:
            bottleneck, decoder = get_bottleneck_layer(name), get_decoder(name)
        except ValueError as error:
            msg = f"encoder: anomalib's reverse distillation has no decoder for {encoder.name}: {error}"
            raise ValueError(msg) from error
        # Nothing uses them, and data-parallel training stops at parameters without a gradient.
        del bottleneck.conv4, bottleneck.bn4
        mode = AnomalyMapGenerationMode(self.hparams["anomaly_map_mode"])  # a checkpoint has its value
        model = DistillationModel(encoder, bottleneck, decoder, AnomalyMapGenerator(size, mode=mode))
        return model, ReverseDistillationLoss()

    def configure_optimizers(self) -> Adam:
        """Configure Adam for bottleneck, decoder and decoupling."""
        return Adam(self.parameter_groups(), betas=(0.5, 0.99))
