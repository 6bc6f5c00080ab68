# SPDX-License-Identifier: Apache-2.0
"""What the package's anomalib models share: length of the training, checkpoints, exports, multi-class evaluation."""

import copy
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from anomalib import LearningType, TaskType
from anomalib.data import AnomalibDataModule, Batch
from anomalib.deploy import CompressionType
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchvision.transforms.v2 import Compose, Normalize, Resize
from typing_extensions import Self

from anomalib_decad.metrics import CategoryEvaluator
from anomalib_decad.post_processor import BoundedPostProcessor, lacks_threshold, without_unknown_range
from anomalib_decad.pre_processor import for_export
from anomalib_decad.quantization import compress, quantize, quantize_with_accuracy_control

__all__ = ["BaseModule"]

logger = logging.getLogger(__name__)

#: What Lightning sets max_epochs to when it is given neither max_steps nor max_epochs nor max_time.
_LIGHTNING_MAX_EPOCHS = 1000

#: The lowest ONNX operator set that torch writes without a conversion.
_OPSET = 18

_RNG_KEY = "anomalib_decad_rng"


# anomalib lists, and finds by name, the direct subclasses of its base class: this must not be one, but the models must.
if TYPE_CHECKING:
    _Base = AnomalibModule
else:
    _Base = object


class BaseModule(_Base):
    """Base of the package's anomalib models, which also have ``AnomalibModule`` as a base, behind this one.

    A subclass sets ``self.model``, a torch module with a frozen part ``encoder`` (with ``load_weights``), a method
    ``frozen(image_size)`` that copies it for inference, and :attr:`is_prepared` and :meth:`prepare` of its own.

    Args:
        max_steps (int): Training steps where the trainer is given neither max_steps nor max_epochs.
        gradient_clip_val (float): Norm that gradients are clipped to. The trainer's own gradient_clip_val comes first.
        pre_processor (PreProcessor | bool): Pre-processor, or whether to use the default one.
        post_processor (PostProcessor | bool): Post-processor, or whether to use the default one.
        evaluator (Evaluator | bool): Evaluator, or whether to use the default one.
        visualizer (Visualizer | bool): Visualizer, or whether to use the default one.

    Raises:
        ValueError: If ``max_steps`` is not positive.
    """

    model: Any

    #: Arguments that a checkpoint only fits with.
    shape_arguments: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        max_steps: int,
        gradient_clip_val: float,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        if not max_steps > 0:
            msg = f"max_steps must be positive, got {max_steps}"
            raise ValueError(msg)
        self.max_steps = max_steps
        self.gradient_clip_val = gradient_clip_val

    def resize_for_encoder(
        self, pre_processor: PreProcessor | bool, image_size: tuple[int, int] | None, default: tuple[int, int]
    ) -> None:
        """Resize to a size and normalise as the encoder was trained, if the user wants the default pre-processor.

        Args:
            pre_processor (PreProcessor | bool): The argument of the model.
            image_size (tuple[int, int] | None): The argument of the model: height and width in pixels.
            default (tuple[int, int]): Height and width if that is ``None``.

        Raises:
            ValueError: If there is an ``image_size``, but not the default pre-processor.
        """
        if pre_processor is True:
            encoder = self.model.encoder
            resize = Resize(tuple(image_size or default), antialias=True)
            normalize = Normalize(mean=list(encoder.image_mean), std=list(encoder.image_std))
            self.pre_processor = PreProcessor(transform=Compose([resize, normalize]))
        elif image_size is not None:
            msg = "image_size belongs to the default pre_processor: give the size to the pre_processor instead"
            raise ValueError(msg)

    def configure_post_processor(self) -> PostProcessor:
        """Configure anomalib's post-processor, in bounded memory."""
        return BoundedPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Configure the evaluator of the seven metrics for each category."""
        return CategoryEvaluator()

    @property
    def learning_type(self) -> LearningType:
        """One-class: only normal images are trained with."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer arguments that the model sets."""
        return {"num_sanity_val_steps": 0}

    def setup(self, stage: str) -> None:
        """Set the default number of training steps.

        Args:
            stage (str): ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        """
        trainer = self.trainer
        if stage == "fit" and trainer.max_steps == -1 and trainer.max_epochs == _LIGHTNING_MAX_EPOCHS:
            trainer.fit_loop.epoch_loop.max_steps = self.max_steps
            trainer.fit_loop.max_epochs = -1
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
        if self.is_prepared:
            return
        # Lightning begins the first epoch here, whose random numbers are those of the training.
        self.trainer.fit_loop.setup_data()
        with isolate_rng():
            # How many have been used up by now depends on the number of workers.
            torch.manual_seed(torch.initial_seed())
            self.model.train()
            self.prepare()
            if self.trainer.world_size > 1:
                own = {
                    name: value for name, value in self.model.state_dict().items() if not name.startswith("encoder.")
                }
                self.model.load_state_dict(self.trainer.strategy.broadcast(own), strict=False)

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
        if not torch.isfinite(loss):
            values = ", ".join(f"{name} {value.item():.3g}" for name, value in terms.items())
            msg = (
                f"the training loss is not finite at step {self.global_step} ({values}). Lower "
                "learning_rate, or train with --trainer.precision 32"
            )
            raise RuntimeError(msg)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=batch_size)
        self.log_dict({f"train_{name}": value for name, value in terms.items()}, batch_size=batch_size)
        return loss

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Predict a batch, for the post-processor's thresholds.

        Args:
            batch (Batch): Batch with images of shape (B, 3, H, W).
            *args (Any): Unused.
            **kwargs (Any): Unused.

        Returns:
            STEP_OUTPUT: The batch with ``pred_score`` and ``anomaly_map``.
        """
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the random number generators, so that a resumed run goes on as an unbroken one.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint[_RNG_KEY] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint[_RNG_KEY]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and restore the random number generators if a fit is resumed.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.

        Raises:
            ValueError: If the checkpoint is of a model of other shape; the message names the arguments to give.
        """
        mine, theirs = self.hparams, checkpoint.get("hyper_parameters", {})
        different = [
            f"{name} {_plain(theirs[name])}"
            for name in self.shape_arguments
            if name in theirs and name in mine and _plain(theirs[name]) != _plain(mine[name])
        ]
        if different:
            flags = " ".join(f"--model.{item}" for item in different)
            msg = f"the checkpoint is of a {type(self).__name__} of another shape: give it the arguments {flags}"
            raise ValueError(msg)
        super().on_load_checkpoint(checkpoint)
        # Before the dataloaders draw their seeds, as when the checkpoint was saved.
        if self._trainer is not None and self.trainer.training and _RNG_KEY in checkpoint:
            torch.set_rng_state(checkpoint[_RNG_KEY]["cpu"].cpu())
            device = self.trainer.strategy.root_device
            if device.type == "cuda" and "cuda" in checkpoint[_RNG_KEY]:
                torch.cuda.set_rng_state(checkpoint[_RNG_KEY]["cuda"].cpu(), device)

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export to PyTorch; arguments and result are those of ``AnomalibModule.to_torch``."""
        return super(BaseModule, self._for_export(native=True)).to_torch(*args, **kwargs)

    def to_onnx(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX, also on the way to OpenVINO.

        Pre- and post-processing are in the graph, the batch size is free.

        Args:
            export_root (Path | str): Folder to export to.
            model_file_name (str): Name of the file, without its ending.
                Defaults to ``"model"``.
            input_size (tuple[int, int] | None): Height and width of the input images.
                Defaults to ``None``: images of any size, which the graph resizes.
            **kwargs (Any): Arguments of ``AnomalibModule.to_onnx``, and from there of ``torch.onnx.export``.

        Returns:
            Path: The ONNX file.

        Raises:
            ValueError: If the model does not resize its input and no fitting ``input_size`` is given.
        """
        if self.input_size is None and input_size is None:
            msg = "the pre_processor does not resize to one size: give that of the images (--input_size)"
            raise ValueError(msg)
        kwargs.setdefault("opset_version", _OPSET)
        return super(BaseModule, self._for_export(input_size)).to_onnx(
            export_root, model_file_name, input_size, **kwargs
        )

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | str | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Path:
        """Export to OpenVINO.

        Args:
            export_root (Path | str): Folder to export to.
            model_file_name (str): Name of the files, without their endings.
                Defaults to ``"model"``.
            input_size (tuple[int, int] | None): Height and width of the input images.
                Defaults to ``None``: images of any size, which the graph resizes.
            compression_type (CompressionType | str | None): ``"FP16"`` or ``"INT8"`` for smaller files, ``"INT8_PTQ"``
                or ``"INT8_ACQ"`` (with accuracy control) for speed.
                Defaults to ``None``: none.
            datamodule (AnomalibDataModule | None): Images for ``"INT8_PTQ"`` and ``"INT8_ACQ"``: training images for
                the ranges of the activations, validation images for the accuracy control.
            metric (Metric | None): Accuracy that ``"INT8_ACQ"`` controls; any of anomalib's metrics, higher is better.
                Defaults to ``None``: the F1 score of the predicted labels.
            *args (Any): Further arguments of ``AnomalibModule.to_openvino``.
            **kwargs (Any): Further arguments of ``AnomalibModule.to_openvino``.

        Returns:
            Path: The .xml file, beside which the .bin file is.

        Raises:
            ValueError: If ``compression_type`` is unknown, or needs a datamodule and there is none, or needs labels and
                the model has no thresholds because it was never validated.
        """
        compression = CompressionType(compression_type.lower()) if isinstance(compression_type, str) else None
        if compression in {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ} and datamodule is None:
            # Before the minute that the graph takes.
            msg = f"{compression.value} needs images to calibrate with: give the data of the training (--data ...)"
            raise ValueError(msg)
        if compression == CompressionType.INT8_ACQ and metric is None and lacks_threshold(self.post_processor):
            msg = (
                "INT8_ACQ controls the accuracy of labels, but the model was never validated and has no thresholds: "
                "export a checkpoint that was saved after a validation, or use INT8_PTQ"
            )
            raise ValueError(msg)
        return super().to_openvino(
            export_root, model_file_name, input_size, compression, datamodule, metric, *args, **kwargs
        )

    def _compress_ov_model(self, model: Any, compression_type: CompressionType | None = None, *args: Any) -> Any:
        """Compress as anomalib does, but keep some weights in floating point for ``INT8``, too."""
        if compression_type == CompressionType.INT8:
            return compress(model)
        return super()._compress_ov_model(model, compression_type, *args)

    @staticmethod
    def _post_training_quantization_ov(model: Any, datamodule: AnomalibDataModule | None = None) -> Any:
        """Quantise for ``INT8_PTQ``."""
        return quantize(model, datamodule)

    @staticmethod
    def _accuracy_control_quantization_ov(
        model: Any,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,
        max_drop: float = 0.01,
    ) -> Any:
        """Quantise for ``INT8_ACQ``."""
        del task  # unused by anomalib, too
        return quantize_with_accuracy_control(model, datamodule, metric, max_drop)

    def _for_export(self, input_size: tuple[int, int] | None = None, native: bool = False) -> Self:
        """Copy the module without what only training needs, specialised for its image size."""
        module = copy.copy(self)
        module._trainer = None
        module._modules = dict(self._modules)
        module.model = self.model.frozen(self.input_size or input_size)
        for name, value in [*vars(module).items(), *module._modules.items()]:
            if isinstance(value, Callback):
                setattr(module, name, _detached(value))
        if isinstance(module.pre_processor, PreProcessor):
            module.pre_processor = for_export(module.pre_processor, native)
        if isinstance(module.post_processor, PostProcessor):
            module.post_processor = without_unknown_range(module.post_processor)
        return module

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a model from a checkpoint, which has all weights: neither the hub nor a weights file is needed.

        Args:
            checkpoint_path (str | Path): The checkpoint.
            *args (Any): Arguments of ``AnomalibModule.load_from_checkpoint``.
            **kwargs (Any): Arguments of ``AnomalibModule.load_from_checkpoint``, and overriding model arguments.

        Returns:
            Self: The model.
        """
        kwargs.setdefault("encoder_weights", None)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)  # type: ignore[return-value]


def _detached(callback: Callback) -> Callback:
    """Copy a callback without the methods that a trainer gave it: they are bound to the model, and pickled with it."""
    copied = copy.copy(callback)
    for name in ("log", "log_dict"):
        vars(copied).pop(name, None)
    return copied


def _plain(value: Any) -> Any:
    """Make equal sequences compare equal."""
    return list(value) if isinstance(value, list | tuple) else value
