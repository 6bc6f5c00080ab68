# SPDX-License-Identifier: Apache-2.0
"""UniAD with decoupling, as an anomalib model."""

from typing import Any

from anomalib.models.components import AnomalibModule

from anomalib_decad.components.encoders import CNNEncoder, ViTPyramid
from anomalib_decad.models.decoupled import DecoupledMixin
from anomalib_decad.models.decoupled_model import FeatureMSELoss
from anomalib_decad.models.uniad.torch_model import DecoupledUniADModel

__all__ = ["DecoupledUniAD"]


class DecoupledUniAD(DecoupledMixin, AnomalibModule):
    """UniAD, whose embedding between transformer encoder and decoder is decoupled.

    Feature maps of a frozen network are jittered and reconstructed by a transformer that must not look at what it
    reconstructs: attention is masked around each position, and learned queries enter each layer of the decoder. What it
    cannot reconstruct is an anomaly.

    Args:
        encoder (str): Name of a timm convolutional network or vision transformer. Of the former, the stages 0 to 3 are
            reconstructed (strides of 2 to 16 pixels).
            Defaults to ``"efficientnet_b4"``.
        hidden_dim (int): Channels of the transformer. Defaults to ``256``.
        num_layers (int): Layers of the transformer's encoder, and of its decoder. Defaults to ``4``.
        num_heads (int): Attention heads of a layer. Defaults to ``8``.
        neighbors (int): Side of the square around a position that attention is masked in, in positions; odd.
            Defaults to ``7``.
        jitter (float): Scale of the noise that is added to the features in training; 0 for none. Defaults to ``20.0``.
        learning_rate (float): Learning rate of AdamW; it falls to a tenth after 80 % of the training.
            Defaults to ``1e-4``, as in the paper.
        weight_decay (float): Weight decay of AdamW. Defaults to ``1e-4``, as in the paper.
        gradient_clip_val (float): Norm that gradients are clipped to, unless the trainer has its own; 0 for none.
            Defaults to ``0.1``, as in the paper's code.
        **kwargs (Any): Arguments of :class:`DecoupledMixin`, whose errors are raised.

    Reference:
        You et al.: A Unified Model for Multi-class Anomaly Detection. NeurIPS 2022.
    """

    architecture = DecoupledMixin.architecture | {"hidden_dim", "neighbors", "num_heads", "num_layers"}
    stages = (0, 1, 2, 3)
    default_size = (224, 224)

    def __init__(
        self,
        encoder: str = "efficientnet_b4",
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

    def make(
        self, encoder: CNNEncoder | ViTPyramid, size: tuple[int, int]
    ) -> tuple[DecoupledUniADModel, FeatureMSELoss]:
        """Make the plain method from ``self.hparams``."""
        names = ("hidden_dim", "num_layers", "num_heads", "neighbors", "jitter")
        model = DecoupledUniADModel(encoder, size, **{name: self.hparams[name] for name in names})
        return model, FeatureMSELoss()
