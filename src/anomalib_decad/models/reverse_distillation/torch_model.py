# SPDX-License-Identifier: Apache-2.0
"""Reverse distillation with decoupling, as a torch module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.models.components.backbone import get_decoder
from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode
from anomalib.models.image.reverse_distillation.torch_model import ReverseDistillationModel

from anomalib_decad.components import CategoryRecognizer, attach, create_encoder
from anomalib_decad.models.decoupled_model import DistillationModel

__all__ = ["DecoupledReverseDistillationModel"]

_STAGES = (1, 2, 3)  # of a ResNet that are distilled: strides of 4, 8 and 16 pixels
# A vision transformer's outputs become a pyramid with the channels of this network, which gives bottleneck and decoder.
_TRANSFORMER_DECODER, _TRANSFORMER_CHANNELS = "resnet50", (256, 512, 1024)


class DecoupledReverseDistillationModel(DistillationModel, ReverseDistillationModel):  # type: ignore[misc]
    """anomalib's reverse distillation, whose bottleneck embedding is decoupled.

    Bottleneck, decoder, anomaly map and score are anomalib's own. The arguments that are not listed, and the errors,
    are those of :class:`DecoupledReverseDistillation`.

    Args:
        pretrained (bool): Whether the encoder gets weights at all; random ones are for tests only.
        **kwargs (Any): Further arguments of :class:`EmbeddingDecoupling`.
    """

    def __init__(
        self,
        encoder: str = "wide_resnet50_2",
        encoder_weights: str | Path | None = None,
        layers: Sequence[int] | None = None,
        image_size: tuple[int, int] = (256, 256),
        anomaly_map_mode: AnomalyMapGenerationMode | str = AnomalyMapGenerationMode.ADD,
        decouple: bool = True,
        pretrained: bool = True,
        **kwargs: Any,
    ) -> None:
        frozen = create_encoder(encoder, layers, encoder_weights, pretrained, _STAGES, _TRANSFORMER_CHANNELS)
        frozen.check(*image_size)
        resnet = encoder.partition(".")[0]
        try:
            with torch.device("meta"):  # no weights are made
                get_decoder(resnet)
        except ValueError as error:
            if not hasattr(frozen, "vit"):
                msg = f"encoder: anomalib's reverse distillation has no decoder for {encoder}: {error}"
                raise ValueError(msg) from error
            resnet = _TRANSFORMER_DECODER
        # Its own encoder is replaced, so that weights come lazily, from a file as well, or from the checkpoint.
        mode = AnomalyMapGenerationMode(anomaly_map_mode)  # a checkpoint has its value
        super().__init__(resnet, image_size, ["layer1", "layer2", "layer3"], mode, pre_trained=False)
        self.encoder = frozen
        self.recognizer = CategoryRecognizer()
        # Nothing uses them, and data-parallel training stops at parameters without a gradient.
        del self.bottleneck.conv4, self.bottleneck.bn4
        if decouple:
            attach(self, "bottleneck", 2 * frozen.channels[-1], **kwargs)
