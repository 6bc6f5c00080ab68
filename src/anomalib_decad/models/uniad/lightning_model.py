# SPDX-License-Identifier: Apache-2.0
"""UniAD with decoupling, as an anomalib model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib.models.components import AnomalibModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import AdamW

from anomalib_decad.components import FeatureMSELoss
from anomalib_decad.models.decoupled_module import DecoupledModule
from anomalib_decad.models.uniad.torch_model import DecoupledUniADModel

__all__ = ["DecoupledUniAD"]


class DecoupledUniAD(DecoupledModule, AnomalibModule):
    """UniAD, whose embedding between transformer encoder and decoder is decoupled.

    Feature maps of a frozen network are jittered and reconstructed by a transformer that must not look at what it
    reconstructs: attention is masked around each position, and learned queries enter each layer of the decoder. What it
    cannot reconstruct is an anomaly.

    Args:
        encoder (str): Name of a timm convolutional network or vision transformer.
            Defaults to ``"efficientnet_b4"``.
        encoder_weights (str | Path | None): Local .safetensors or .pth file with the encoder's weights.
            Defaults to ``None``: timm's pretrained weights, from the Hugging Face hub or its local cache.
        layers (Sequence[int] | None): Stages of a convolutional network, counted from 0 at a stride of 2 pixels, or
            layers (blocks) of a transformer, counted from 1.
            Defaults to ``None``: the stages 0 to 3 (strides of 2 to 16 pixels), or the layers 3, 6 and 9.
        image_size (tuple[int, int] | None): Height and width that images are resized to.
            Defaults to ``None``: (224, 224), or 20 x 20 patches of a transformer.
        hidden_dim (int): Channels of the transformer.
            Defaults to ``256``.
        num_layers (int): Layers of the transformer's encoder, and of its decoder.
            Defaults to ``4``.
        num_heads (int): Attention heads of a layer.
            Defaults to ``8``.
        neighbors (int): Side of the square around a position that attention is masked in, in positions; odd.
            Defaults to ``7``.
        jitter (float): Scale of the noise that is added to the features in training; 0 for none.
            Defaults to ``20.0``.
        learning_rate (float): Learning rate of AdamW; it falls to a tenth after 80 % of the training.
            Defaults to ``1e-4``, as in the paper.
        weight_decay (float): Weight decay of AdamW.
            Defaults to ``1e-4``, as in the paper.
        gradient_clip_val (float): Norm that gradients are clipped to; 0 for no clipping. The trainer's own
            gradient_clip_val comes first.
            Defaults to ``0.1``, as in the paper's code.
        **kwargs (Any): Arguments of :class:`DecoupledModule`.

    Raises:
        ValueError: If an argument is out of its range or does not fit the encoder.
        FileNotFoundError: If ``encoder_weights`` is no file.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_decad import DecoupledUniAD, MultiCategory
        >>> datamodule = MultiCategory("MVTecAD", root="./datasets/MVTecAD")
        >>> Engine(max_steps=15_000).train(DecoupledUniAD(), datamodule=datamodule)  # doctest: +SKIP

    Reference:
        You et al.: A Unified Model for Multi-class Anomaly Detection. NeurIPS 2022.
    """

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
        size = self.model_size(encoder, image_size, (224, 224))
        self.model = DecoupledUniADModel(
            encoder,
            encoder_weights,
            layers,
            size,
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            neighbors=neighbors,
            jitter=jitter,
            **self.decoupling_arguments,
        )
        self.loss = FeatureMSELoss()
        self.resize_for_encoder(image_size, size)
        self.weight_decay = weight_decay

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure AdamW, whose learning rate falls to a tenth after 80 % of the training.

        Returns:
            OptimizerLRScheduler: The optimizer and its scheduler.
        """
        return self.step_down(AdamW(self.parameter_groups(), weight_decay=self.weight_decay))
