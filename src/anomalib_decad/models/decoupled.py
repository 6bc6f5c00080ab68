# SPDX-License-Identifier: Apache-2.0
"""What the anomalib models share that are another method with a decoupled embedding."""

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from anomalib.data import Batch
from anomalib.models.components import AnomalibModule
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
from anomalib_decad.models.base import MultiClassMixin, parameter_groups
from anomalib_decad.ranges import check_range

__all__ = ["DecoupledMixin"]

if TYPE_CHECKING:

    class _Base(MultiClassMixin, AnomalibModule): ...
else:
    _Base = MultiClassMixin


class DecoupledMixin(_Base):
    """Trains another method with decoupling: its own loss, plus the decoupling's terms.

    A model is ``class Model(DecoupledMixin, AnomalibModule)``. Its :meth:`build` sets ``self.model``, a
    :class:`DecoupledModel`, and ``self.loss``, the method's own loss of what that returns in training mode.

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
        **kwargs (Any): Arguments of :class:`MultiClassMixin`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_decad import DecoupledUniAD, MultiCategory
        >>> datamodule = MultiCategory("MVTecAD", root="./datasets/MVTecAD")
        >>> Engine(max_steps=15_000).train(DecoupledUniAD(), datamodule=datamodule)  # doctest: +SKIP
    """

    architecture = frozenset({"decouple", "decoupler", "encoder", "image_size", "invertible", "layers"})

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
        super().__init__(**kwargs)
        for name in ("learning_rate", "decoupling_learning_rate"):
            check_range(self.hparams[name] > 0, name, "positive", self.hparams[name])

    def method_arguments(self, size: tuple[int, int], *names: str) -> dict[str, Any]:
        """Give the arguments of the method's torch module.

        Args:
            size (tuple[int, int]): Height and width of the images if nothing else is said, for a convolutional network.
            *names (str): Names of the method's own arguments.

        Returns:
            dict[str, Any]: The arguments.

        Raises:
            ValueError: If the user's pre-processor does not resize to one size.
        """
        arguments = self.hparams
        if self.has_own_pre_processor and self.pre_processor is not None:
            if self.input_size is None:
                msg = f"{type(self).__name__} takes images of one size: have the pre_processor resize to it"
                raise ValueError(msg)
            size = self.input_size
        else:
            height, width = arguments["image_size"] or default_size(arguments["encoder"], size)
            size = height, width
        own = ("encoder", "encoder_weights", "layers", "decouple", "delta", *names)
        return {
            "image_size": size,
            **{name: arguments[name] for name in own},
            "decoupler": DecouplerOptions(**arguments["decoupler"]),
            "synthesis": SynthesisOptions(**arguments["synthesis"]),
            "invertible": InvertibleOptions(**arguments["invertible"]),
            "loss": DecouplingLossOptions(**arguments["loss"]),
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the parameters to train, and their learning rates, to an optimizer."""
        rates = self.hparams["learning_rate"], self.hparams["decoupling_learning_rate"]
        return parameter_groups(self.model, self.model.decoupling, *rates)

    def step_down(self, optimizer: Optimizer) -> OptimizerLRScheduler:
        """Have an optimizer's learning rates fall to a tenth after 80 % of the training."""
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
