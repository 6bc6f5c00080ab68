# SPDX-License-Identifier: Apache-2.0
"""Reverse distillation with decoupling, as a torch module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.models.components.backbone import get_decoder
from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode
from anomalib.models.image.reverse_distillation.torch_model import ReverseDistillationModel

from anomalib_decad.components import CategoryPrediction, CategoryRecognizer, attach, create_encoder
from anomalib_decad.models.decoupled_model import DecoupledModel

__all__ = ["DecoupledReverseDistillationModel"]

#: Whose bottleneck and decoder, and the channels of whose stages, are taken with a vision transformer.
_TRANSFORMER_DECODER, _TRANSFORMER_CHANNELS = "resnet50", (256, 512, 1024)

#: Stages of a ResNet that are distilled: strides of 4, 8 and 16 pixels.
_STAGES = (1, 2, 3)


class DecoupledReverseDistillationModel(DecoupledModel, ReverseDistillationModel):
    """anomalib's reverse distillation, whose bottleneck embedding is decoupled.

    Bottleneck, decoder, anomaly map and score are anomalib's own.

    Args:
        encoder (str): Name of a ResNet that anomalib has a decoder for, or of a timm vision transformer, whose outputs
            become a pyramid with the channels of a ResNet-50.
        encoder_weights (str | Path | None): Local file with its weights; ``None`` for timm's pretrained weights.
        layers (Sequence[int] | None): Three stages of a ResNet, counted from 0, or layers of a transformer, counted
            from 1; ``None`` for the paper's, or the layers 3, 6 and 9.
        image_size (tuple[int, int]): Height and width of the images in pixels.
        anomaly_map_mode (AnomalyMapGenerationMode | str): How the maps of the stages are joined.
        decouple (bool): Whether anomalies are synthesized and removed; without, it is anomalib's method.
        pretrained (bool): Whether the encoder gets weights at all; a random one is good for tests only.
        **kwargs (Any): Further arguments of :class:`EmbeddingDecoupling`.

    Raises:
        ValueError: If an argument is out of its range, or anomalib has no decoder for the encoder.
        FileNotFoundError: If ``encoder_weights`` is no file.

    Reference:
        Deng and Li: Anomaly Detection via Reverse Distillation from One-Class Embedding. CVPR 2022.
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

    def forward(  # type: ignore[override]
        self, images: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]] | CategoryPrediction:
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
        anomaly_map = self.anomaly_map_generator(features, reconstructions)
        return CategoryPrediction(
            pred_score=anomaly_map.amax(dim=(1, 2, 3)), anomaly_map=anomaly_map, category=self.recognizer(features)
        )
