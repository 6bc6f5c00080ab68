# SPDX-License-Identifier: Apache-2.0
"""Reverse distillation with decoupling, as an anomalib model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib.models.components import AnomalibModule
from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
from torch.optim import Adam

from anomalib_decad.models.decoupled import DecoupledMixin
from anomalib_decad.models.reverse_distillation.torch_model import DecoupledReverseDistillationModel

__all__ = ["DecoupledReverseDistillation"]


class DecoupledReverseDistillation(DecoupledMixin, AnomalibModule):
    """anomalib's reverse distillation (RD4AD), whose bottleneck embedding is decoupled.

    A decoder distils a frozen encoder's feature maps from a bottleneck embedding of them; what it cannot reproduce is
    an anomaly. Between bottleneck and decoder, what is abnormal is removed from the embedding.

    Args:
        encoder (str): Name of a ResNet that anomalib has a decoder for, or of a timm vision transformer.
            Defaults to ``"wide_resnet50_2"``.
        encoder_weights (str | Path | None): Local .safetensors or .pth file with the encoder's weights.
            Defaults to ``None``: timm's pretrained weights.
        layers (Sequence[int] | None): Stages of a convolutional network, counted from 0 at a stride of 2 pixels, or
            layers (blocks) of a transformer, counted from 1.
            Defaults to ``None``: the stages 1, 2 and 3 (strides of 4, 8 and 16 pixels), or the layers 3, 6 and 9.
        image_size (tuple[int, int] | None): Height and width that images are resized to.
            Defaults to ``None``: (256, 256), or 20 x 20 patches of a transformer.
        anomaly_map_mode (AnomalyMapGenerationMode): How the maps of the stages are joined.
            Defaults to ``AnomalyMapGenerationMode.ADD``.
        learning_rate (float): Learning rate of Adam, for bottleneck and decoder.
            Defaults to ``0.005``, as in the paper and in anomalib.
        gradient_clip_val (float): Norm to clip gradients to, unless the trainer has one; 0: none. Defaults to ``0.0``.
        **kwargs (Any): Arguments of :class:`DecoupledMixin`.

    Raises:
        ValueError: If an argument is out of its range or does not fit the encoder.
        FileNotFoundError: If ``encoder_weights`` is no file.

    Reference:
        Deng and Li: Anomaly Detection via Reverse Distillation from One-Class Embedding. CVPR 2022.
    """

    architecture = DecoupledMixin.architecture | {"anomaly_map_mode"}
    model: DecoupledReverseDistillationModel

    def __init__(
        self,
        encoder: str = "wide_resnet50_2",
        encoder_weights: str | Path | None = None,
        layers: Sequence[int] | None = None,
        image_size: tuple[int, int] | None = None,
        anomaly_map_mode: AnomalyMapGenerationMode = AnomalyMapGenerationMode.ADD,
        learning_rate: float = 0.005,
        gradient_clip_val: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, gradient_clip_val=gradient_clip_val, **kwargs)
        self.build()

    def build(self) -> None:
        """Make model, loss and pre-processor from ``self.hparams``."""
        arguments = self.method_arguments((256, 256), "anomaly_map_mode")
        self.model = DecoupledReverseDistillationModel(**arguments)
        self.loss = ReverseDistillationLoss()
        self.resize_for_encoder(arguments["image_size"])

    def configure_optimizers(self) -> Adam:
        """Configure Adam for bottleneck, decoder and decoupling."""
        return Adam(self.parameter_groups(), betas=(0.5, 0.99))
