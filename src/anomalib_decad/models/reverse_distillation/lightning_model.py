# SPDX-License-Identifier: Apache-2.0
"""Reverse distillation with decoupling, as an anomalib model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch.optim import Adam

from anomalib_decad.components import (
    DecouplerOptions,
    DecouplingLossOptions,
    InvertibleOptions,
    SynthesisOptions,
)
from anomalib_decad.components.embedding_decoupling import LEARNED_DECOUPLER, LEARNED_LOSS, LEARNED_SYNTHESIS
from anomalib_decad.components.options import as_options
from anomalib_decad.models.decoupled_module import DecoupledModule
from anomalib_decad.models.reverse_distillation.torch_model import DecoupledReverseDistillationModel

__all__ = ["DecoupledReverseDistillation"]


class DecoupledReverseDistillation(DecoupledModule, AnomalibModule):
    """anomalib's reverse distillation (RD4AD), whose bottleneck embedding is decoupled.

    A decoder distils a frozen encoder's feature maps from a bottleneck embedding of them; what it cannot reproduce is
    an anomaly. Between bottleneck and decoder, what is abnormal is removed from the embedding.

    Args:
        encoder (str): Name of a ResNet that anomalib has a decoder for, or of a timm vision transformer.
            Defaults to ``"wide_resnet50_2"``.
        encoder_weights (str | Path | None): Local .safetensors or .pth file with the encoder's weights.
            Defaults to ``None``: timm's pretrained weights, from the Hugging Face hub or its local cache.
        layers (Sequence[int] | None): Stages of a convolutional network, counted from 0 at a stride of 2 pixels, or
            layers (blocks) of a transformer, counted from 1.
            Defaults to ``None``: the stages 1, 2 and 3 (strides of 4, 8 and 16 pixels), or the layers 3, 6 and 9.
        image_size (tuple[int, int] | None): Height and width that images are resized to.
            Defaults to ``None``: (256, 256), or 20 x 20 patches of a transformer.
        anomaly_map_mode (AnomalyMapGenerationMode): How the maps of the stages are joined.
            Defaults to ``AnomalyMapGenerationMode.ADD``.
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
        learning_rate (float): Learning rate of Adam, for bottleneck and decoder.
            Defaults to ``0.005``, as in the paper and in anomalib.
        gradient_clip_val (float): Norm that gradients are clipped to; 0 for no clipping. The trainer's own
            gradient_clip_val comes first.
            Defaults to ``0.0``.
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
        >>> from anomalib_decad import DecoupledReverseDistillation, MultiCategory
        >>> datamodule = MultiCategory("MVTecAD", root="./datasets/MVTecAD")
        >>> Engine(max_steps=15_000).train(DecoupledReverseDistillation(), datamodule=datamodule)  # doctest: +SKIP

    Reference:
        Deng and Li: Anomaly Detection via Reverse Distillation from One-Class Embedding. CVPR 2022.
    """

    model: DecoupledReverseDistillationModel
    shape_arguments = ("encoder", "layers", "decouple", "decoupler.abnormal_fraction")

    def __init__(
        self,
        encoder: str = "wide_resnet50_2",
        encoder_weights: str | Path | None = None,
        layers: Sequence[int] | None = None,
        image_size: tuple[int, int] | None = None,
        anomaly_map_mode: AnomalyMapGenerationMode = AnomalyMapGenerationMode.ADD,
        decouple: bool = True,
        delta: float = 2.5,
        decoupler: DecouplerOptions = LEARNED_DECOUPLER,
        synthesis: SynthesisOptions = LEARNED_SYNTHESIS,
        invertible: InvertibleOptions = InvertibleOptions(),
        loss: DecouplingLossOptions = LEARNED_LOSS,
        decoupling_learning_rate: float = 1e-3,
        max_steps: int = 15_000,
        learning_rate: float = 0.005,
        gradient_clip_val: float = 0.0,
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
        size = self.model_size(encoder, pre_processor, image_size, (256, 256))
        self.model = DecoupledReverseDistillationModel(
            encoder,
            encoder_weights,
            layers,
            size,
            anomaly_map_mode,
            decouple=decouple,
            delta=delta,
            decoupler=decoupler,
            synthesis=synthesis,
            invertible=invertible,
            loss=loss,
        )
        self.loss = ReverseDistillationLoss()
        self.resize_for_encoder(pre_processor, image_size, size)

    def configure_optimizers(self) -> Adam:
        """Configure Adam for bottleneck, decoder and decoupling.

        Returns:
            Adam: The optimizer.
        """
        return Adam(self.parameter_groups(), betas=(0.5, 0.99))

    @classmethod
    def checkpoint_safe_globals(cls) -> Sequence[Any]:
        """Allow ``AnomalyMapGenerationMode`` in checkpoints."""
        return (AnomalyMapGenerationMode,)
