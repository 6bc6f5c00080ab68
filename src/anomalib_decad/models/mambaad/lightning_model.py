# SPDX-License-Identifier: Apache-2.0
"""MambaAD with decoupling, as an anomalib model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from anomalib.models.components import AnomalibModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import AdamW

from anomalib_decad.components import FeatureMSELoss
from anomalib_decad.models.decoupled import DecoupledMixin
from anomalib_decad.models.mambaad.torch_model import DecoupledMambaADModel

__all__ = ["DecoupledMambaAD"]

_LOSS_WEIGHT = 5.0


class DecoupledMambaAD(DecoupledMixin, AnomalibModule):
    """MambaAD, whose bottleneck embedding is decoupled.

    As reverse distillation, but the decoder is one of selective state spaces, which scan the feature maps along Hilbert
    curves in eight directions, beside convolutions that see the neighborhood. On a GPU the scan uses the package
    ``mamba_ssm`` if that is installed.

    Args:
        encoder (str): Name of a timm convolutional network whose stages double their channels, or of a vision
            transformer. Defaults to ``"resnet34"``.
        encoder_weights (str | Path | None): Local .safetensors or .pth file with the encoder's weights.
            Defaults to ``None``: timm's pretrained weights.
        layers (Sequence[int] | None): Stages of a convolutional network, counted from 0 at a stride of 2 pixels, or
            layers (blocks) of a transformer, counted from 1.
            Defaults to ``None``: the stages 1, 2 and 3 (strides of 4, 8 and 16 pixels), or the layers 3, 6 and 9.
        image_size (tuple[int, int] | None): Height and width that images are resized to.
            Defaults to ``None``: (256, 256), or 20 x 20 patches of a transformer.
        depths (Sequence[int]): State space blocks of the decoder's four stages, from the coarsest; multiples of 2 or 3.
            Defaults to ``(3, 4, 6, 3)``.
        num_directions (int): Directions that a state space block scans in: 2, 4 or 8. Defaults to ``8``.
        scan (str): Curve that it scans along: ``"hilbert"``, ``"sweep"``, ``"scan"``, ``"zigzag"`` or ``"zorder"``.
            Defaults to ``"hilbert"``.
        learning_rate (float): Learning rate of AdamW; it falls to a tenth after 80 % of the training.
            Defaults to ``0.005``, as in the paper.
        weight_decay (float): Weight decay of AdamW. Defaults to ``1e-4``, as in the paper.
        gradient_clip_val (float): Norm to clip gradients to, unless the trainer has one; 0: none. Defaults to ``0.0``.
        **kwargs (Any): Arguments of :class:`DecoupledMixin`.

    Raises:
        ValueError: If an argument is out of its range or does not fit the encoder.
        FileNotFoundError: If ``encoder_weights`` is no file.

    Reference:
        He et al.: MambaAD: Exploring State Space Models for Multi-class Unsupervised Anomaly Detection. NeurIPS 2024.
    """

    architecture = DecoupledMixin.architecture | {"depths", "num_directions", "scan"}
    model: DecoupledMambaADModel

    def __init__(
        self,
        encoder: str = "resnet34",
        encoder_weights: str | Path | None = None,
        layers: Sequence[int] | None = None,
        image_size: tuple[int, int] | None = None,
        depths: Sequence[int] = (3, 4, 6, 3),
        num_directions: int = 8,
        scan: Literal["hilbert", "sweep", "scan", "zigzag", "zorder"] = "hilbert",
        learning_rate: float = 0.005,
        weight_decay: float = 1e-4,
        gradient_clip_val: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, gradient_clip_val=gradient_clip_val, **kwargs)
        self.build()

    def build(self) -> None:
        """Make model, loss and pre-processor from ``self.hparams``."""
        arguments = self.method_arguments((256, 256), "depths", "num_directions", "scan")
        self.model = DecoupledMambaADModel(**arguments)
        self.loss = FeatureMSELoss(_LOSS_WEIGHT)
        self.resize_for_encoder(arguments["image_size"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure AdamW, whose learning rate falls to a tenth after 80 % of the training."""
        return self.step_down(AdamW(self.parameter_groups(), weight_decay=self.hparams["weight_decay"]))
