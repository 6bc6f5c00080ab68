# SPDX-License-Identifier: Apache-2.0
"""UniAD with decoupling, as an anomalib model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib.models.components import AnomalibModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import AdamW

from anomalib_decad.components import FeatureMSELoss
from anomalib_decad.models.decoupled import DecoupledMixin
from anomalib_decad.models.uniad.torch_model import DecoupledUniADModel

__all__ = ["DecoupledUniAD"]


class DecoupledUniAD(DecoupledMixin, AnomalibModule):
    """UniAD, whose embedding between transformer encoder and decoder is decoupled.

    Feature maps of a frozen network are jittered and reconstructed by a transformer that must not look at what it
    reconstructs: attention is masked around each position, and learned queries enter each layer of the decoder. What it
    cannot reconstruct is an anomaly.

    Args:
        encoder (str): Name of a timm convolutional network or vision transformer. Defaults to ``"efficientnet_b4"``.
        encoder_weights (str | Path | None): Local .safetensors or .pth file with the encoder's weights.
            Defaults to ``None``: timm's pretrained weights.
        layers (Sequence[int] | None): Stages of a convolutional network, counted from 0 at a stride of 2 pixels, or
            layers (blocks) of a transformer, counted from 1.
            Defaults to ``None``: the stages 0 to 3 (strides of 2 to 16 pixels), or the layers 3, 6 and 9.
        image_size (tuple[int, int] | None): Height and width that images are resized to.
            Defaults to ``None``: (224, 224), or 20 x 20 patches of a transformer.
        hidden_dim (int): Channels of the transformer. Defaults to ``256``.
        num_layers (int): Layers of the transformer's encoder, and of its decoder. Defaults to ``4``.
        num_heads (int): Attention heads of a layer. Defaults to ``8``.
        neighbors (int): Side of the square around a position that attention is masked in, in positions; odd.
            Defaults to ``7``.
        jitter (float): Scale of the noise that is added to the features in training; 0 for none. Defaults to ``20.0``.
        learning_rate (float): Learning rate of AdamW; it falls to a tenth after 80 % of the training.
            Defaults to ``1e-4``, as in the paper.
        weight_decay (float): Weight decay of AdamW. Defaults to ``1e-4``, as in the paper.
        gradient_clip_val (float): Norm to clip gradients to, unless the trainer has its own; 0 for none.
            Defaults to ``0.1``, as in the paper's code.
        **kwargs (Any): Arguments of :class:`DecoupledMixin`.

    Raises:
        ValueError: If an argument is out of its range or does not fit the encoder.
        FileNotFoundError: If ``encoder_weights`` is no file.

    Reference:
        You et al.: A Unified Model for Multi-class Anomaly Detection. NeurIPS 2022.
    """

    architecture = DecoupledMixin.architecture | {"hidden_dim", "neighbors", "num_heads", "num_layers"}
    model: DecoupledUniADModel

    def __init__(
        self,
        encoder: str = "efficientnet_b4",
        encoder_weights: str | Path | None = None,
        layers: Sequence[int] | None = None,
        image_size: tuple[int, int] | None = None,
        hidden_dim: int = 256,
        num_layers: int = 4,
        num_heads: int = 8,
        neighbors: int = 7,
        jitter: float = 20.0,
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-4,
        gradient_clip_val: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, gradient_clip_val=gradient_clip_val, **kwargs)
        self.build()

    def build(self) -> None:
        """Make model, loss and pre-processor from ``self.hparams``."""
        own = ("hidden_dim", "num_layers", "num_heads", "neighbors", "jitter")
        arguments = self.method_arguments((224, 224), *own)
        self.model = DecoupledUniADModel(**arguments)
        self.loss = FeatureMSELoss()
        self.resize_for_encoder(arguments["image_size"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure AdamW, whose learning rate falls to a tenth after 80 % of the training."""
        return self.step_down(AdamW(self.parameter_groups(), weight_decay=self.hparams["weight_decay"]))
