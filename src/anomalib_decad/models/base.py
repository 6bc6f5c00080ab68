# SPDX-License-Identifier: Apache-2.0
"""What the package's anomalib models share beside ``AnomalibModule``."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.engine.plugins import AnomalibCheckpointIO
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_decad.callbacks import AnomalyMapWriter, LastCheckpoint, PredictionTable, Report
from anomalib_decad.data import CategoryVisualizer, PredictionFolder
from anomalib_decad.export import ParityExportMixin
from anomalib_decad.metrics import CategoryEvaluator, lacks_threshold
from anomalib_decad.models.checkpoint import (
    ClearCheckpointIO,
    check_checkpoint,
    differences,
    mark_checkpoint,
    to_plain,
)
from anomalib_decad.ranges import check_range
from anomalib_decad.thresholds import CategoryPostProcessor

__all__ = ["MultiClassMixin", "load_product", "parameter_groups"]

logger = logging.getLogger(__name__)

#: What Lightning sets max_epochs to when it is given neither max_steps nor max_epochs nor max_time.
_LIGHTNING_MAX_EPOCHS = 1000

#: Those of Lightning's with weights in float32, which the invertible network and small learning rates need.
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")

#: Steps between checks of the loss on a device.
_CHECK_EVERY = 10

#: Training images of each product, evenly spaced, that it is recognized by; and how many are encoded at once.
_PRODUCT_IMAGES, _BATCH = 16, 8

_RNG_KEY, _WHITES_KEY = "anomalib_decad_rng", "anomalib_decad_white_levels"

# anomalib lists, and finds by name, the direct subclasses of AnomalibModule: this must not be one, but the models must.
if TYPE_CHECKING:

    class _Base(ParityExportMixin, AnomalibModule): ...
else:
    _Base = ParityExportMixin


class MultiClassMixin(_Base):
    """Multi-class evaluation, decisions of each product, and checkpoints that say what their model is.

    A model is ``class Model(MultiClassMixin, AnomalibModule)``. It sets :attr:`architecture`, and :meth:`build` makes
    its parts from ``self.hparams``: ``self.model``, a torch module with a frozen part ``encoder``, a part
    ``recognizer`` and, in eval mode, a :class:`CategoryPrediction` as its output. ``__init__`` of a model ends with
    ``self.build()``.

    Args:
        gradient_clip_val (float): Norm that gradients are clipped to; 0 for no clipping. The trainer's own
            gradient_clip_val comes first.
        max_steps (int): Training steps where the trainer is given neither max_steps nor max_epochs.
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
        save_maps (Literal["off", "float16", "float32"]): Whether a test or a prediction writes the raw anomaly maps as
            TIFF files of that type, where MVTec's evaluation looks for them.
            Defaults to ``"off"``.
        report (bool): Whether a test writes ``report.html``: metrics, curves, and the images that are worth a look.
            Defaults to ``True``.

    Raises:
        ValueError: If an argument is out of its range, or ``image_size`` is given beside a ``pre_processor``.
    """

    #: Arguments that say what the model is: a checkpoint has them, and a model takes them from it.
    architecture: ClassVar[frozenset[str]]

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
        # Checkpoints and loggers hold plain values only.
        self.save_hyperparameters({name: to_plain(value) for name, value in self.hparams.items()})
        check_range(max_steps > 0, "max_steps", "positive", max_steps)
        check_range(gradient_clip_val >= 0, "gradient_clip_val", "at least 0", gradient_clip_val)
        types = "'off', 'float16' or 'float32'"
        check_range(save_maps in {"off", "float16", "float32"}, "save_maps", types, repr(save_maps))
        parts = {"pre_processor": pre_processor, "post_processor": post_processor, "evaluator": evaluator}
        self._given_parts = {name for name, part in {**parts, "visualizer": visualizer}.items() if part is not True}
        self.has_own_pre_processor = "pre_processor" in self._given_parts
        if self.has_own_pre_processor and self.hparams.get("image_size") is not None:
            msg = "image_size belongs to the default pre_processor: give the size to the pre_processor instead"
            raise ValueError(msg)
        self._rng_state: dict[str, torch.Tensor] | None = None
        #: White level of the images of high bit depth of each category in the training.
        self.white_levels: dict[str, float] = {}

    def build(self) -> None:
        """Make the parts of the model from ``self.hparams``."""
        raise NotImplementedError

    def resize_for_encoder(self, default: tuple[int, int]) -> None:
        """Make the default pre-processor: resize to image_size and normalize as the encoder was trained.

        Args:
            default (tuple[int, int]): Height and width if image_size is ``None``.

        Raises:
            ValueError: If image_size is not two positive numbers.
        """
        size = tuple(self.hparams.get("image_size") or default)
        check_range(len(size) == 2 and min(size) > 0, "image_size", "two positive numbers, as [280, 280]", [*size])
        if not self.has_own_pre_processor:
            normalize = Normalize(mean=list(self.model.encoder.image_mean), std=list(self.model.encoder.image_std))
            made = PreProcessor(transform=Compose([Resize(size, antialias=True), normalize]))
            # In place: it is a callback, too, which the trainer has already where a checkpoint is loaded.
            pre_processor = cast("PreProcessor", self.pre_processor)
            pre_processor.transform, pre_processor.export_transform = made.transform, made.export_transform

    def configure_post_processor(self) -> PostProcessor:
        """Configure anomalib's post-processor, with thresholds of each product."""
        return CategoryPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Configure the evaluator of the seven metrics for each category."""
        return CategoryEvaluator()

    @classmethod
    def configure_visualizer(cls) -> CategoryVisualizer:
        """Configure the visualizer, which has a folder for each category."""
        return CategoryVisualizer()

    def configure_callbacks(self) -> list[Callback]:
        """Configure anomalib's callbacks and this package's; one of a kind that the trainer has already is left out."""
        components = super().configure_callbacks()
        callbacks: list[Callback] = [components] if isinstance(components, Callback) else list(components)
        extras: list[Callback] = [PredictionTable()]
        if self.hparams["save_maps"] != "off":
            extras.append(AnomalyMapWriter(self.hparams["save_maps"]))
        if self.hparams["report"]:
            extras.append(Report())
        if self.trainer.checkpoint_callbacks:
            extras.append(LastCheckpoint())
        kinds = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        # The folder is read before the pre-processor sees its images.
        return [PredictionFolder(), *callbacks, *(extra for extra in extras if type(extra) not in kinds)]

    @property
    def learning_type(self) -> LearningType:
        """One-class: only normal images are trained with."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer arguments that the model sets."""
        return {"num_sanity_val_steps": 0}

    def setup(self, stage: str) -> None:
        """Set the default number of training steps; a ValueError if weights are to be in less than float32."""
        trainer = self.trainer
        precisions = f"one of {', '.join(_PRECISIONS)}"
        check_range(trainer.precision in _PRECISIONS, "precision", precisions, trainer.precision)
        if type(trainer.strategy.checkpoint_io) is AnomalibCheckpointIO:
            trainer.strategy.checkpoint_io = ClearCheckpointIO(self.checkpoint_safe_globals())
        if stage == "fit" and trainer.max_steps == -1 and trainer.max_epochs == _LIGHTNING_MAX_EPOCHS:
            # trainer_arguments would override what the user gives (docs/upstream.md, "Trainer arguments of a model").
            trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.max_epochs = self.hparams["max_steps"], -1
            logger.info("Neither max_steps nor max_epochs is set: training for %d steps.", self.hparams["max_steps"])

    # Training

    @property
    def is_prepared(self) -> bool:
        """Whether what :meth:`prepare` sets has been set, or loaded from a checkpoint."""
        return True

    def prepare(self) -> None:
        """Set what depends on the data alone, before the first step, with training images."""

    def prepare_products(self, known: Sequence[str]) -> None:
        """Set what depends on the products, where the data have others than a prepared model has ``known``."""

    def on_fit_start(self) -> None:
        """Load the encoder's weights, and prepare the model.

        A model that has been prepared, as one from a checkpoint, stays as it is. Of several processes, all end with the
        model of the first.

        Raises:
            EncoderWeightsError: If the weights cannot be had and no checkpoint brought them.
        """
        # Not earlier: only now has Lightning loaded the checkpoint, if any.
        self.model.encoder.load_weights()
        self.white_levels = dict(getattr(getattr(self.trainer, "datamodule", None), "white_levels", {}))
        with isolate_rng():
            # How many random numbers have been drawn by now depends on the number of workers.
            torch.manual_seed(torch.initial_seed())
            known = self.model.recognizer.names
            changed = self._learn_products()
            if not self.is_prepared:
                self.model.train()
                self.prepare()
                changed = True
            elif changed:
                self.prepare_products(known)
        if changed and self.trainer.world_size > 1:
            own = {name: value for name, value in self.model.state_dict().items() if not name.startswith("encoder.")}
            self.model.load_state_dict(self.trainer.strategy.broadcast(own), strict=False)

    def _learn_products(self) -> bool:
        """Learn to recognize the products, if they are not those that the model knows."""
        dataset: Any = getattr(getattr(self.trainer, "datamodule", None), "train_data", None)
        samples: Any = getattr(dataset, "samples", {})
        names = sorted(samples["category"].unique()) if "category" in samples else []
        if not names or names == self.model.recognizer.names:
            return False
        descriptors = {}
        for name in names:
            loader = load_product(dataset, name, _PRODUCT_IMAGES, dataset.collate_fn)
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                descriptors[name] = torch.cat([self.model.recognizer.describe(self.encode(batch)) for batch in loader])
        self.model.recognizer.learn(descriptors)
        if isinstance(self.post_processor, CategoryPostProcessor) and self.post_processor.categories:
            self.post_processor.follow(names)
        return True

    def encode(self, batch: Any) -> Any:
        """Encode a batch of training images, not yet on the device, to feature maps."""
        return self.model.encoder(self.to_model(batch).image)

    def to_model(self, batch: Any) -> Any:
        """Bring a batch of a dataset to the device, its images transformed as in the training."""
        batch = self.trainer.strategy.batch_to_device(batch)
        transform = getattr(self.pre_processor, "transform", None)
        return batch.update(image=transform(batch.image)) if transform and isinstance(batch, Batch) else batch

    def training_loader(self) -> Iterable[Any]:
        """Give a loader of training images for :meth:`prepare`, not that of the training, which has begun to read."""
        if datamodule := getattr(self.trainer, "datamodule", None):
            return datamodule.train_dataloader()
        self.trainer.fit_loop.setup_data()  # the trainer was given dataloaders, which it connects later otherwise
        return cast("DataLoader", self.trainer.train_dataloader)

    def on_train_start(self) -> None:
        """Go on with the random numbers of the checkpoint, after the dataloaders have drawn theirs."""
        if self._rng_state is not None:
            torch.set_rng_state(self._rng_state["cpu"].cpu())
            if self.device.type == "cuda" and "cuda" in self._rng_state:
                torch.cuda.set_rng_state(self._rng_state["cuda"].cpu(), self.device)
            self._rng_state = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Have Lightning validate after the last step, also within an epoch: a validation finds the thresholds."""
        del outputs, batch, batch_idx
        trainer = self.trainer
        is_last_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if is_last_epoch or trainer.global_step >= trainer.max_steps != -1:
            trainer.should_stop = True

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
        """Clip gradients to the trainer's gradient_clip_val or else the model's."""
        self.clip_gradients(
            optimizer,
            gradient_clip_val=self.hparams["gradient_clip_val"] if gradient_clip_val is None else gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm or "norm",
        )

    # Prediction

    def on_test_start(self) -> None:
        """Say so where labels mean nothing."""
        if lacks_threshold(self.post_processor):
            logger.warning(
                "The model was never validated, so it has no thresholds: scores and maps are as they are, and labels "
                "and masks mean nothing. Use a checkpoint that was saved after a validation "
                "(--trainer.val_check_interval says when these are)."
            )

    on_predict_start = on_test_start

    def forward(self, batch: torch.Tensor, *args: Any, **kwargs: Any) -> InferenceBatch:
        """Predict images, as an export does.

        Args:
            batch (torch.Tensor): Images of shape (B, 3, H, W), of any size, in [0, 1].
            *args (Any): Unused, as ``kwargs``.
            **kwargs (Any): Unused.

        Returns:
            InferenceBatch: Scores, maps, labels and masks. Without a post-processor, raw scores and maps.

        Raises:
            RuntimeError: If the model is in training mode.
        """
        if self.training:
            msg = "the model is in training mode, in which it does not predict: call model.eval() before"
            raise RuntimeError(msg)
        prediction = super().forward(batch, *args, **kwargs)
        return prediction if self.post_processor else InferenceBatch(*prediction[:4])

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """Add the prediction to a batch: also as it is before the post-processor, and the index of the product."""
        del args, kwargs
        prediction = self.model(batch.image)
        batch.category_index, batch.raw_score = prediction.category, prediction.pred_score  # type: ignore[attr-defined]
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.trainer.testing or any(isinstance(callback, AnomalyMapWriter) for callback in callbacks):
            batch.raw_map = prediction.anomaly_map  # type: ignore[attr-defined]
        return batch.update(pred_score=prediction.pred_score, anomaly_map=prediction.anomaly_map)

    test_step = predict_step = validation_step

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the model is, and the state of the random number generators."""
        super().on_save_checkpoint(checkpoint)
        if self.input_size is not None:
            # A model may be made for a size that only its pre-processor knows.
            checkpoint["hyper_parameters"]["image_size"] = list(self.input_size)
        mark_checkpoint(checkpoint, type(self))
        checkpoint[_WHITES_KEY] = self.white_levels
        checkpoint[_RNG_KEY] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint[_RNG_KEY]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Become the checkpoint's model: what was left at its default is taken from there.

        Raises:
            ValueError: If the checkpoint is of another model or version, its weights are NaN, or an argument
                contradicts it; the message names the arguments.
        """
        check_checkpoint(checkpoint, type(self))
        changed = differences(type(self), self.architecture, self.hparams, checkpoint["hyper_parameters"])
        if changed:
            self.hparams.update({**changed, "encoder_weights": None})
            with torch.random.fork_rng():
                self.build()
        # anomalib lets the checkpoint's parts replace those that were given.
        flags = checkpoint.get("anomalib_components_enabled", {})
        kept = {"anomalib_components_enabled": {n: on for n, on in flags.items() if n not in self._given_parts}}
        configs = {f"anomalib_{name}_config" for name in self._given_parts}
        super().on_load_checkpoint({key: value for key, value in {**checkpoint, **kept}.items() if key not in configs})
        if self.post_processor is None:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("post_processor.")}
        self._rng_state, self.white_levels = checkpoint[_RNG_KEY], checkpoint[_WHITES_KEY]

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a model from a checkpoint, which has all weights: neither the hub nor a weights file is needed.

        The arguments are those of ``AnomalibModule.load_from_checkpoint``, and the model's.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no checkpoint of this model, or an argument contradicts it.
        """
        content = ClearCheckpointIO(cls.checkpoint_safe_globals()).load_checkpoint(checkpoint_path)
        check_checkpoint(content, cls)
        given = {name: value for name, value in kwargs.items() if name in cls.architecture}
        differences(cls, given, given, content["hyper_parameters"])
        if "pre_processor" in kwargs:
            kwargs["image_size"] = None
        return super().load_from_checkpoint(checkpoint_path, *args, **{"encoder_weights": None, **kwargs})


def parameter_groups(
    model: nn.Module, part: nn.Module | None, learning_rate: float, part_learning_rate: float
) -> list[dict[str, Any]]:
    """Group the parameters to train for an optimizer, those of a part with a learning rate of their own.

    Args:
        model (nn.Module): The model.
        part (nn.Module | None): The part of it, if it has it.
        learning_rate (float): Learning rate of all others.
        part_learning_rate (float): Learning rate of the part.

    Returns:
        list[dict[str, Any]]: Parameter groups: all others, and the part if there is one.
    """
    own = [p for p in part.parameters() if p.requires_grad] if part else []
    known = set(own)
    others = [p for p in model.parameters() if p.requires_grad and p not in known]
    groups = [{"params": others, "lr": learning_rate}]
    return [*groups, {"params": own, "lr": part_learning_rate}] if own else groups


def load_product(
    dataset: Any, name: str | None, count: int, collate_fn: Callable | None, num_workers: int = 0
) -> DataLoader:
    """Load so many images of a product, evenly spaced; all where there are not as many, of all products without a name.

    The ``dataset`` of the loader is a ``Subset``, whose ``indices`` say which they are.
    """
    rows = list(range(len(dataset)))
    if name is not None:
        rows = (dataset.samples.category == name).to_numpy().nonzero()[0].tolist()
    count = min(count, len(rows))
    chosen = [rows[number * len(rows) // count] for number in range(count)]
    return DataLoader(Subset(dataset, chosen), _BATCH, collate_fn=collate_fn, num_workers=num_workers)
