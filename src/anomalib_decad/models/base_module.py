# SPDX-License-Identifier: Apache-2.0
"""What the package's anomalib models share: length of the training, checkpoints, multi-class evaluation."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_decad.compat import set_training_steps, trainer_of
from anomalib_decad.decisions import CategoryPostProcessor
from anomalib_decad.export import ParityExportMixin
from anomalib_decad.metrics import CategoryEvaluator
from anomalib_decad.models.checkpoint import CheckpointMixin, is_group
from anomalib_decad.models.deep_images import DeepImagesMixin
from anomalib_decad.models.describe_categories import category_names, describe_categories
from anomalib_decad.models.display import tidy_display
from anomalib_decad.models.pinned import pinned
from anomalib_decad.models.predicting import PredictingMixin
from anomalib_decad.ranges import check_range
from anomalib_decad.report import Report
from anomalib_decad.runs import (
    DataOrder,
    FinalValidation,
    GivenRates,
    LastState,
    MapWriter,
    PredictionSummary,
    PredictionTable,
    RunFolder,
)

__all__ = ["BaseModule"]

logger = logging.getLogger(__name__)

#: What Lightning sets max_epochs to when it is given neither max_steps nor max_epochs nor max_time.
_LIGHTNING_MAX_EPOCHS = 1000


# anomalib lists, and finds by name, the direct subclasses of its base class: this must not be one, but the models must.
if TYPE_CHECKING:

    class _Base(CheckpointMixin, PredictingMixin, ParityExportMixin, AnomalibModule): ...
else:

    class _Base(CheckpointMixin, PredictingMixin, ParityExportMixin): ...


# Those of Lightning's with weights in float32, which the invertible network and small learning rates need.
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")

# Steps between checks of the loss on a device.
_CHECK_EVERY = 10


class BaseModule(DeepImagesMixin, _Base):
    """Base of the package's anomalib models, which also have ``AnomalibModule`` as a base, behind this one.

    A subclass sets ``self.model``, a torch module with a frozen part ``encoder`` (with ``load_weights``), a part
    ``recognizer``, and what :class:`ParityExportMixin` asks for; and :attr:`is_prepared` and :meth:`prepare` of its
    own.

    Args:
        gradient_clip_val (float): Norm that gradients are clipped to; 0 for no clipping. The trainer's own
            gradient_clip_val comes first.
        max_steps (int): Training steps where the trainer is given neither max_steps nor max_epochs, for example in
            ``anomalib benchmark``, which gives it none.
            Defaults to ``15000``, as in the paper.
        pre_processor (PreProcessor | bool): Pre-processor, or whether to use the default one: resize to image_size
            and normalize as the encoder was trained.
            Defaults to ``True``.
        post_processor (PostProcessor | bool): Post-processor, or whether to use the default one: anomalib's, with
            thresholds of each product (:class:`CategoryPostProcessor`).
            Defaults to ``True``.
        evaluator (Evaluator | bool): Evaluator, or whether to use the default one: the seven metrics for each category.
            Defaults to ``True``.
        visualizer (Visualizer | bool): Visualizer, or whether to use the default one: a folder for each category.
            Defaults to ``True``.
        save_maps (Literal["off", "float16", "float32"]): Whether a test or a prediction writes the anomaly maps as TIFF
            files of that type, as they are before the post-processor, where MVTec's evaluation looks for them.
            Defaults to ``"off"``.
        report (bool): Whether a test writes ``report.html``: metrics, curves, and the images that are worth a look, in
            one page.
            Defaults to ``True``.

    Raises:
        ValueError: If ``max_steps`` is not positive, ``gradient_clip_val`` is negative, or ``save_maps`` unknown.
    """

    model: Any

    def __init__(
        self,
        gradient_clip_val: float,
        max_steps: int = 15_000,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        save_maps: Literal["off", "float16", "float32"] = "off",
        report: bool = True,
    ) -> None:
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        parts = {
            "pre_processor": pre_processor, "post_processor": post_processor, "evaluator": evaluator,
            "visualizer": visualizer,
        }  # fmt: skip
        self.given_parts = frozenset(name for name, part in parts.items() if part is not True)
        self._run_folder = RunFolder()
        self._report = Report() if report else None
        # Checkpoints and loggers hold plain values only.
        plain = {name: asdict(value) for name, value in self.hparams.items() if is_group(value)}
        plain |= {name: value.value for name, value in self.hparams.items() if isinstance(value, Enum)}
        if plain:
            self.save_hyperparameters(plain)
        check_range(max_steps > 0, "max_steps", "positive", max_steps)
        check_range(gradient_clip_val >= 0, "gradient_clip_val", "at least 0", gradient_clip_val)
        types = "'off', 'float16' or 'float32'"
        check_range(save_maps in {"off", "float16", "float32"}, "save_maps", types, repr(save_maps))
        self.save_maps = save_maps
        self.max_steps = max_steps
        self.gradient_clip_val = gradient_clip_val

    def resize_for_encoder(self, image_size: tuple[int, int] | None, default: tuple[int, int]) -> None:
        """Resize to a size and normalize as the encoder was trained, if the user wants the default pre-processor.

        Args:
            image_size (tuple[int, int] | None): The argument of the model: height and width in pixels.
            default (tuple[int, int]): Height and width if that is ``None``.

        Raises:
            ValueError: If there is an ``image_size``, but not the default pre-processor, or it is not two positive
                numbers.
        """
        sides = tuple(image_size or default)
        check_range(len(sides) == 2 and min(sides) > 0, "image_size", "two positive numbers, as [280, 280]", [*sides])
        if "pre_processor" not in self.given_parts:
            encoder = self.model.encoder
            resize = Resize(sides, antialias=True)
            normalize = Normalize(mean=list(encoder.image_mean), std=list(encoder.image_std))
            self.pre_processor = PreProcessor(transform=Compose([resize, normalize]))
        elif image_size is not None:
            msg = "image_size belongs to the default pre_processor: give the size to the pre_processor instead"
            raise ValueError(msg)

    def configure_post_processor(self) -> PostProcessor:
        """Configure anomalib's post-processor, with thresholds of each product."""
        return CategoryPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Configure the evaluator of the seven metrics for each category."""
        return CategoryEvaluator()

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Configure anomalib's callbacks, and those that see to the run."""
        trainer = trainer_of(self)
        if trainer is not None:
            self._run_folder.choose(trainer, self.name)
        callbacks = super().configure_callbacks()
        components = [callbacks] if isinstance(callbacks, Callback) else callbacks
        writers: list[Callback] = [PredictionTable()]
        if self.save_maps != "off":
            writers.append(MapWriter(self.save_maps))
        given = trainer.callbacks if trainer is not None else []  # type: ignore[attr-defined]
        # The user's own takes its place; Lightning would keep the model's.
        is_given = any(isinstance(callback, Report) and callback is not self._report for callback in given)
        if self._report is not None and not is_given:
            writers.append(self._report)
        # Behind the post-processor, which gives labels. What is printed last comes last.
        ends = [DataOrder(), GivenRates(), FinalValidation(), PredictionSummary(), LastState()]
        return [self._run_folder, *components, *writers, *ends]

    @property
    def learning_type(self) -> LearningType:
        """One-class: only normal images are trained with."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer arguments that the model sets."""
        return {"num_sanity_val_steps": 0}

    def setup(self, stage: str) -> None:
        """Set the default number of training steps, and what is shown.

        Args:
            stage (str): ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ValueError: If the weights are to be in another precision than float32.
        """
        trainer = self.trainer
        precisions = f"one of {', '.join(_PRECISIONS)}"
        check_range(trainer.precision in _PRECISIONS, "precision", precisions, trainer.precision)
        tidy_display(trainer, stage, self.evaluator)
        if stage == "fit" and trainer.max_steps == -1 and trainer.max_epochs == _LIGHTNING_MAX_EPOCHS:
            set_training_steps(trainer, self.max_steps)
            logger.info("Neither max_steps nor max_epochs is set: training for %d steps.", self.max_steps)

    @property
    def is_prepared(self) -> bool:
        """Whether what :meth:`prepare` sets has been set, or loaded from a checkpoint."""
        return True

    def prepare(self) -> None:
        """Set what depends on the data alone, before the first step, with training images."""

    def on_fit_start(self) -> None:
        """Load the encoder's weights, and prepare the model.

        A model that has been prepared, as one from a checkpoint, stays as it is. Of several processes, all end with the
        model of the first.

        Raises:
            EncoderWeightsError: If the weights cannot be had and no checkpoint brought them.
        """
        # Not earlier: only now has Lightning loaded the checkpoint, if any.
        self.model.encoder.load_weights()
        # Lightning begins the first epoch here, whose random numbers are those of the training.
        self.trainer.fit_loop.setup_data()
        with isolate_rng():
            # How many have been used up by now depends on the number of workers.
            torch.manual_seed(torch.initial_seed())
            changed = self._learn_categories()
            if not self.is_prepared:
                self.model.train()
                self.prepare()
                changed = True
            if changed and self.trainer.world_size > 1:
                own = {
                    name: value for name, value in self.model.state_dict().items() if not name.startswith("encoder.")
                }
                self.model.load_state_dict(self.trainer.strategy.broadcast(own), strict=False)

    def _learn_categories(self) -> bool:
        """Learn to recognize the products, if they are not those that the model knows."""
        dataset = getattr(getattr(self.trainer, "datamodule", None), "train_data", None)
        names, recognizer = category_names(dataset), self.model.recognizer
        if not names or names == recognizer.names:
            return False
        with self.trainer.precision_plugin.forward_context():
            recognizer.learn(describe_categories(dataset, self.encode))
        if isinstance(self.post_processor, CategoryPostProcessor) and self.post_processor.categories:
            self.post_processor.follow(names)
        return True

    def encode(self, batch: Any) -> Any:
        """Encode a batch of training images that a dataset has given.

        Args:
            batch (Any): The batch, not yet on the device.

        Returns:
            Any: Feature maps.
        """
        return self.model.encoder(self.received(batch).image)

    def received(self, batch: Any) -> Any:
        """Bring a batch that a dataset has given to the device, its images transformed as in the training.

        Args:
            batch (Any): Images, or what the feature cache gives.

        Returns:
            Any: The batch.
        """
        batch = self.trainer.strategy.batch_to_device(batch)
        transform = getattr(self.pre_processor, "transform", None)
        return batch.update(image=transform(batch.image)) if transform and isinstance(batch, Batch) else batch

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Put a batch where an NVIDIA GPU can copy it from while it computes."""
        del dataloader_idx
        return pinned(batch) if self.device.type == "cuda" else batch

    def training_loader(self) -> Iterable[Any]:
        """Give a loader of training images for :meth:`prepare`, not that of the training, which has begun to read."""
        datamodule = getattr(self.trainer, "datamodule", None)
        return datamodule.train_dataloader() if datamodule else cast("DataLoader", self.trainer.train_dataloader)

    def log_losses(self, loss: torch.Tensor, terms: Mapping[str, torch.Tensor], batch_size: int) -> torch.Tensor:
        """Log the loss of a training step and its terms.

        Args:
            loss (torch.Tensor): The loss, a scalar.
            terms (Mapping[str, torch.Tensor]): Its terms by name, scalars.
            batch_size (int): Number of images.

        Returns:
            torch.Tensor: The loss.

        Raises:
            RuntimeError: If the loss is not finite.
        """
        # A device would wait: there, what is not finite is seen a few steps later.
        is_due = loss.device.type == "cpu" or self.global_step % _CHECK_EVERY == 0
        if is_due and not torch.isfinite(loss):
            values = ", ".join(f"{name} {value.item():.3g}" for name, value in terms.items())
            msg = (
                f"the training loss is not finite at step {self.global_step} ({values}). Lower "
                "learning_rate, or train with --trainer.precision 32"
            )
            raise RuntimeError(msg)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=batch_size)
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, batch_size=batch_size)
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients to the trainer's gradient_clip_val or else the model's.

        Args:
            optimizer (Optimizer): The optimizer.
            gradient_clip_val (int | float | None): The trainer's value.
            gradient_clip_algorithm (str | None): The trainer's algorithm.
        """
        self.clip_gradients(
            optimizer,
            gradient_clip_val=self.gradient_clip_val if gradient_clip_val is None else gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm or "norm",
        )
