# SPDX-License-Identifier: Apache-2.0
"""MambaAD with decoupling, as an anomalib model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

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
from anomalib_decad.models.mambaad.torch_model import DecoupledMambaADModel

__all__ = ["DecoupledMambaAD"]

_LOSS_WEIGHT = 5.0


class DecoupledMambaAD(DecoupledModule, AnomalibModule):
    """MambaAD, whose bottleneck embedding is decoupled.

    As reverse distillation, but the decoder is one of selective state spaces, which scan the feature maps along Hilbert
    curves in eight directions, beside convolutions that see the neighborhood. The scan uses the package ``mamba_ssm``
    where that is installed and the model is on a GPU, and otherwise one in plain PyTorch.

    Args:
        encoder (str): Name of a timm convolutional network whose stages double their channels, or of a vision
            transformer.
            Defaults to ``"resnet34"``.
        encoder_weights (str | Path | None): Local .safetensors or .pth file with the encoder's weights.
            Defaults to ``None``: timm's pretrained weights, from the Hugging Face hub or its local cache.
        layers (Sequence[int] | None): Stages of a convolutional network, counted from 0 at a stride of 2 pixels, or
            layers (blocks) of a transformer, counted from 1.
            Defaults to ``None``: the stages 1, 2 and 3 (strides of 4, 8 and 16 pixels), or the layers 3, 6 and 9.
        image_size (tuple[int, int] | None): Height and width that images are resized to.
            Defaults to ``None``: (256, 256), or 20 x 20 patches of a transformer.
        depths (Sequence[int]): State space blocks of the decoder's four stages, from the coarsest; multiples of 2 or 3.
            Defaults to ``(3, 4, 6, 3)``.
        num_directions (int): Directions that a state space block scans in: 2, 4 or 8.
            Defaults to ``8``.
        scan (str): Curve that it scans along: ``"hilbert"``, ``"sweep"``, ``"scan"``, ``"zigzag"`` or ``"zorder"``.
            Defaults to ``"hilbert"``.
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
            Defaults to ``0.005``, as in the paper.
        weight_decay (float): Weight decay of AdamW.
            Defaults to ``1e-4``, as in the paper.
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
        >>> from anomalib_decad import DecoupledMambaAD, MultiCategory
        >>> datamodule = MultiCategory("MVTecAD", root="./datasets/MVTecAD")
        >>> Engine(max_steps=15_000).train(DecoupledMambaAD(), datamodule=datamodule)  # doctest: +SKIP

    Reference:
        He et al.: MambaAD: Exploring State Space Models for Multi-class Unsupervised Anomaly Detection. NeurIPS 2024.
    """

    model: DecoupledMambaADModel
    shape_arguments = (
        "encoder", "layers", "image_size", "depths", "num_directions", "scan", "decouple",
        "decoupler.abnormal_fraction",
    )  # fmt: skip

    def __init__(
        self,
        encoder: str = "resnet34",
        encoder_weights: str | Path | None = None,
        layers: Sequence[int] | None = None,
        image_size: tuple[int, int] | None = None,
        depths: Sequence[int] = (3, 4, 6, 3),
        num_directions: int = 8,
        scan: Literal["hilbert", "sweep", "scan", "zigzag", "zorder"] = "hilbert",
        decouple: bool = True,
        delta: float = 2.5,
        decoupler: DecouplerOptions = LEARNED_DECOUPLER,
        synthesis: SynthesisOptions = LEARNED_SYNTHESIS,
        invertible: InvertibleOptions = InvertibleOptions(),
        loss: DecouplingLossOptions = LEARNED_LOSS,
        decoupling_learning_rate: float = 1e-3,
        max_steps: int = 15_000,
        learning_rate: float = 0.005,
        weight_decay: float = 1e-4,
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
        self.model = DecoupledMambaADModel(
            encoder,
            encoder_weights,
            layers,
            size,
            depths=depths,
            num_directions=num_directions,
            scan=scan,
            decouple=decouple,
            delta=delta,
            decoupler=decoupler,
            synthesis=synthesis,
            invertible=invertible,
            loss=loss,
        )
        self.loss = FeatureMSELoss(_LOSS_WEIGHT)
        self.resize_for_encoder(pre_processor, image_size, size)
        self.weight_decay = weight_decay

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure AdamW, whose learning rate falls to a tenth after 80 % of the training.

        Returns:
            OptimizerLRScheduler: The optimizer and its scheduler.
        """
        return self.step_down(AdamW(self.parameter_groups(), weight_decay=self.weight_decay))
