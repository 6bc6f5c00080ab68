# SPDX-License-Identifier: Apache-2.0
"""UniAD with decoupling, as an anomalib model."""

from collections.abc import Sequence
from pathlib import Path

from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import AdamW

from anomalib_decad.components import (
    DecouplerOptions,
    DecouplingLossOptions,
    FeatureMSELoss,
    InvertibleOptions,
    SynthesisOptions,
)
from anomalib_decad.components.embedding_decoupling import LEARNED_DECOUPLER, LEARNED_LOSS, LEARNED_SYNTHESIS
from anomalib_decad.components.options import as_options
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
        decouple (bool): Whether anomalies are synthesized and removed. Without, it is the plain method, to compare
            with.
            Defaults to ``True``.
        delta (float): Radius of the synthetic anomalies, where the mean norm of an embedding is 5.
            Defaults to ``2.5``.
        decoupler (DecouplerOptions): Split of the latent, and its prior.
        synthesis (SynthesisOptions): What synthetic anomalies are like beside their radius.
        invertible (InvertibleOptions): Shape of the invertible network.
        loss (DecouplingLossOptions): Weights of the losses that train the decoupling, beside the method's own.
        decoupling_learning_rate (float): Learning rate of the decoupling.
            Defaults to ``1e-3``.
        max_steps (int): Training steps where the trainer is given neither max_steps nor max_epochs.
            Defaults to ``15000``.
        learning_rate (float): Learning rate of AdamW; it falls to a tenth after 80 % of the training.
            Defaults to ``1e-4``, as in the paper.
        weight_decay (float): Weight decay of AdamW.
            Defaults to ``1e-4``, as in the paper.
        gradient_clip_val (float): Norm that gradients are clipped to; 0 for no clipping. The trainer's own
            gradient_clip_val comes first.
            Defaults to ``0.1``, as in the paper's code.
        pre_processor (PreProcessor | bool): Pre-processor, or whether to use the default one: resize to image_size
            and normalize as the encoder was trained.
            Defaults to ``True``.
        post_processor (PostProcessor | bool): Post-processor, or whether to use the default one: anomalib's, in bounded
            memory.
            Defaults to ``True``.
        evaluator (Evaluator | bool): Evaluator, or whether to use the default one: the seven metrics for each category.
            Defaults to ``True``.
        visualizer (Visualizer | bool): Visualizer, or whether to use anomalib's default one.
            Defaults to ``True``.

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
    shape_arguments = (
        "encoder", "layers", "image_size", "hidden_dim", "num_layers", "decouple", "decoupler.abnormal_fraction",
    )  # fmt: skip

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
        decouple: bool = True,
        delta: float = 2.5,
        decoupler: DecouplerOptions = LEARNED_DECOUPLER,
        synthesis: SynthesisOptions = LEARNED_SYNTHESIS,
        invertible: InvertibleOptions = InvertibleOptions(),
        loss: DecouplingLossOptions = LEARNED_LOSS,
        decoupling_learning_rate: float = 1e-3,
        max_steps: int = 15_000,
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-4,
        gradient_clip_val: float = 0.1,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        decoupler = as_options(DecouplerOptions, decoupler)
        synthesis = as_options(SynthesisOptions, synthesis)
        invertible = as_options(InvertibleOptions, invertible)
        loss = as_options(DecouplingLossOptions, loss)
        super().__init__(
            decoupling_learning_rate=decoupling_learning_rate,
            learning_rate=learning_rate,
            max_steps=max_steps,
            gradient_clip_val=gradient_clip_val,
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        size = self.model_size(encoder, pre_processor, image_size, (224, 224))
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
            decouple=decouple,
            delta=delta,
            decoupler=decoupler,
            synthesis=synthesis,
            invertible=invertible,
            loss=loss,
        )
        self.loss = FeatureMSELoss()
        self.resize_for_encoder(pre_processor, image_size, size)
        self.weight_decay = weight_decay

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure AdamW, whose learning rate falls to a tenth after 80 % of the training.

        Returns:
            OptimizerLRScheduler: The optimizer and its scheduler.
        """
        return self.step_down(AdamW(self.parameter_groups(), weight_decay=self.weight_decay))
