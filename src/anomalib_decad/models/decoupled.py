# SPDX-License-Identifier: Apache-2.0
"""What the anomalib models share that are another method with a decoupled embedding."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from anomalib.data import Batch
from anomalib.models.components import AnomalibModule
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import MultiStepLR

from anomalib_decad.components import (
    DecouplerOptions,
    DecouplingLossOptions,
    InvertibleOptions,
    SynthesisOptions,
    attach,
    create_encoder,
)
from anomalib_decad.components.embedding_decoupling import LEARNED_DECOUPLER, LEARNED_LOSS, LEARNED_SYNTHESIS
from anomalib_decad.components.encoders import CNNEncoder, ViTPyramid
from anomalib_decad.models.base import MultiClassMixin, parameter_groups
from anomalib_decad.models.decoupled_model import DecoupledModel
from anomalib_decad.ranges import check_range

__all__ = ["DecoupledMixin"]

if TYPE_CHECKING:

    class _Base(MultiClassMixin, AnomalibModule): ...
else:
    _Base = MultiClassMixin


class DecoupledMixin(_Base):
    """Trains another method with decoupling: its own loss, plus the decoupling's terms.

    A model is ``class Model(DecoupledMixin, AnomalibModule)`` with an argument ``encoder``, the attributes below, and
    :meth:`make`.

    Args:
        learning_rate (float): Learning rate of the method itself.
        encoder_weights (str | Path | None): Local .safetensors or .pth file with the encoder's weights.
            Defaults to ``None``: timm's pretrained weights.
        layers (Sequence[int] | None): Stages of a convolutional network, counted from 0 at a stride of 2 pixels, or
            layers (blocks) of a transformer, counted from 1.
            Defaults to ``None``: the method's own stages, or the layers 3, 6 and 9.
        image_size (tuple[int, int] | None): Height and width that images are resized to.
            Defaults to ``None``: the method's own, or 20 x 20 patches of a transformer.
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
        gradient_clip_val (float): Norm that gradients are clipped to, unless the trainer has its own; 0 for none.
            Defaults to ``0.0``.
        **kwargs (Any): Arguments of :class:`MultiClassMixin`.

    Raises:
        ValueError: If an argument is out of its range or does not fit the encoder.
        FileNotFoundError: If ``encoder_weights`` is no file.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_decad import DecoupledUniAD, MultiCategory
        >>> datamodule = MultiCategory("MVTecAD", root="./datasets/MVTecAD")
        >>> Engine(max_steps=15_000).train(DecoupledUniAD(), datamodule=datamodule)  # doctest: +SKIP
    """

    architecture = frozenset({"decouple", "decoupler", "encoder", "image_size", "invertible", "layers"})

    #: Stages of a convolutional network, the channels of a transformer's pyramid in their place, if it is to be one,
    #: and the image size of a convolutional network.
    stages: ClassVar[tuple[int, ...]]
    pyramid_channels: ClassVar[tuple[int, ...] | None] = None
    default_size: ClassVar[tuple[int, int]] = (256, 256)

    def __init__(
        self,
        learning_rate: float,
        encoder_weights: str | Path | None = None,
        layers: Sequence[int] | None = None,
        image_size: tuple[int, int] | None = None,
        decouple: bool = True,
        delta: float = 2.5,
        decoupler: DecouplerOptions = LEARNED_DECOUPLER,
        synthesis: SynthesisOptions = LEARNED_SYNTHESIS,
        invertible: InvertibleOptions = InvertibleOptions(),
        loss: DecouplingLossOptions = LEARNED_LOSS,
        decoupling_learning_rate: float = 1e-3,
        gradient_clip_val: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(gradient_clip_val=gradient_clip_val, **kwargs)
        for name in ("learning_rate", "decoupling_learning_rate"):
            check_range(self.hparams[name] > 0, name, "positive", self.hparams[name])
        self.build()

    def make(self, encoder: CNNEncoder | ViTPyramid, size: tuple[int, int]) -> tuple[DecoupledModel, nn.Module]:
        """Make the plain method from ``self.hparams``.

        Args:
            encoder (CNNEncoder | ViTPyramid): Its encoder.
            size (tuple[int, int]): Height and width of the images.

        Returns:
            tuple[DecoupledModel, nn.Module]: Its torch module, and its loss of what that returns in training mode.
        """
        raise NotImplementedError

    def build(self) -> None:
        """Make model, loss and pre-processor from ``self.hparams``."""
        arguments = self.hparams
        encoder = create_encoder(
            arguments["encoder"], arguments["layers"], arguments["encoder_weights"], self.stages, self.pyramid_channels
        )
        size = tuple(arguments["image_size"] or self.default_size)
        if self.has_own_pre_processor and self.pre_processor is not None:
            if self.input_size is None:
                msg = f"{type(self).__name__} takes images of one size: have the pre_processor resize to it"
                raise ValueError(msg)
            size = self.input_size
        elif arguments["image_size"] is None and isinstance(encoder, ViTPyramid):
            size = tuple(20 * side for side in encoder.patch_size)
        height, width = size
        encoder.check(height, width)
        self.model, self.loss = self.make(encoder, (height, width))
        if arguments["decouple"]:
            attach(
                self.model,
                self.model.embedding,
                self.model.embedding_dim,
                delta=arguments["delta"],
                decoupler=DecouplerOptions(**arguments["decoupler"]),
                synthesis=SynthesisOptions(**arguments["synthesis"]),
                invertible=InvertibleOptions(**arguments["invertible"]),
                loss=DecouplingLossOptions(**arguments["loss"]),
            )
        self.resize_for_encoder((height, width))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the parameters to train, and their learning rates, to an optimizer."""
        rates = self.hparams["learning_rate"], self.hparams["decoupling_learning_rate"]
        return parameter_groups(self.model, self.model.decoupling, *rates)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure AdamW, whose learning rates fall to a tenth after 80 % of the training."""
        optimizer = AdamW(self.parameter_groups(), weight_decay=self.hparams["weight_decay"])
        total = self.trainer.estimated_stepping_batches
        last = int(0.8 * total) if math.isfinite(total) else self.hparams["max_steps"]
        scheduler = MultiStepLR(optimizer, milestones=[max(last, 1)], gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def is_prepared(self) -> bool:
        """Whether the decoupling, if any, has seen a batch."""
        return not self.model.decoupling or self.model.decoupling.is_initialized

    @torch.no_grad()
    def prepare(self) -> None:
        """Initialize the decoupling by a batch of training images."""
        batch = next(iter(self.training_loader()))
        self.model(self.to_model(batch).image)
        self.model.decoupling.losses()

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Compute the loss of a batch of normal images.

        Args:
            batch (Batch): Batch with images of shape (B, 3, H, W).
            *args (Any): Unused.
            **kwargs (Any): Unused.

        Returns:
            STEP_OUTPUT: The loss.

        Raises:
            RuntimeError: If the loss is not finite.
        """
        del args, kwargs
        images = cast("torch.Tensor", batch.image)
        features, reconstructions = self.model(images)
        terms = {"reconstruction": self.loss(features, reconstructions)}
        loss = terms["reconstruction"]
        if decoupling := self.model.decoupling:
            terms |= (extra := decoupling.losses())
            loss = loss + sum(extra.values())
        return self.log_losses(loss, terms, len(images))
