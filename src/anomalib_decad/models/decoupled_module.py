# SPDX-License-Identifier: Apache-2.0
"""What the anomalib models with a decoupled embedding share."""

import math
from typing import Any, cast

import torch
from anomalib.data import Batch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from anomalib_decad.components import (
    DecouplerOptions,
    DecouplingLossOptions,
    InvertibleOptions,
    SynthesisOptions,
)
from anomalib_decad.components.embedding_decoupling import LEARNED_DECOUPLER, LEARNED_LOSS, LEARNED_SYNTHESIS
from anomalib_decad.components.encoders import default_size
from anomalib_decad.components.options import as_options
from anomalib_decad.models.base_module import BaseModule
from anomalib_decad.models.parameter_groups import parameter_groups
from anomalib_decad.ranges import check_range

__all__ = ["DecoupledModule"]


class DecoupledModule(BaseModule):
    """Base of the anomalib models that are another method with decoupling; ``AnomalibModule`` comes behind it.

    A subclass sets ``self.model``, a :class:`DecoupledModel`, and ``self.loss``, the method's own loss of what that
    returns in training mode; and it configures the method's optimizer. The loss is the method's own, plus the
    decoupling's terms.

    Args:
        learning_rate (float): Learning rate of the method itself.
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
        **kwargs (Any): Arguments of :class:`BaseModule`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        learning_rate: float,
        decouple: bool = True,
        delta: float = 2.5,
        decoupler: DecouplerOptions = LEARNED_DECOUPLER,
        synthesis: SynthesisOptions = LEARNED_SYNTHESIS,
        invertible: InvertibleOptions = InvertibleOptions(),
        loss: DecouplingLossOptions = LEARNED_LOSS,
        decoupling_learning_rate: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        decoupler = as_options(DecouplerOptions, decoupler)
        synthesis = as_options(SynthesisOptions, synthesis)
        invertible = as_options(InvertibleOptions, invertible)
        loss = as_options(DecouplingLossOptions, loss)
        super().__init__(**kwargs)
        #: Arguments of a :class:`DecoupledModel`.
        self.decoupling_arguments: dict[str, Any] = {
            "decouple": decouple,
            "delta": delta,
            "decoupler": decoupler,
            "synthesis": synthesis,
            "invertible": invertible,
            "loss": loss,
        }
        for name, rate in (
            ("learning_rate", learning_rate),
            ("decoupling_learning_rate", decoupling_learning_rate),
        ):
            check_range(rate > 0, name, "positive", rate)
        self.decoupling_learning_rate = decoupling_learning_rate
        self.learning_rate = learning_rate

    def model_size(self, encoder: str, image_size: tuple[int, int] | None, default: tuple[int, int]) -> tuple[int, int]:
        """Find the height and width of the images that the model will see.

        Args:
            encoder (str): Name of the encoder.
            image_size (tuple[int, int] | None): The argument of the model.
            default (tuple[int, int]): Height and width with a convolutional network, in pixels.

        Returns:
            tuple[int, int]: Height and width in pixels.

        Raises:
            ValueError: If the user's pre-processor does not resize to one size.
        """
        if isinstance(self.pre_processor, PreProcessor) and "pre_processor" in self.given_parts:
            if self.input_size is None:
                msg = f"{type(self).__name__} takes images of one size: have the pre_processor resize to it"
                raise ValueError(msg)
            return self.input_size
        if image_size is None:
            return default_size(encoder, default)
        height, width = image_size
        return height, width

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the parameters to train, and their learning rates, to an optimizer."""
        return parameter_groups(self.model, self.model.decoupling, self.learning_rate, self.decoupling_learning_rate)

    def step_down(self, optimizer: Optimizer) -> OptimizerLRScheduler:
        """Have an optimizer's learning rates fall to a tenth after 80 % of the training.

        Args:
            optimizer (Optimizer): The optimizer.

        Returns:
            OptimizerLRScheduler: The optimizer and its scheduler.
        """
        total = self.trainer.estimated_stepping_batches
        last = int(0.8 * total) if math.isfinite(total) else self.max_steps
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
        self.model(self.received(batch).image)
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
