# SPDX-License-Identifier: Apache-2.0
"""DecAD as an anomalib model."""

import copy
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

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
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_decad.data.feature_cache import FeatureBatch
from anomalib_decad.feature_caching import FeatureCaching
from anomalib_decad.loss import DecADLoss
from anomalib_decad.metrics import CategoryEvaluator
from anomalib_decad.post_processor import BoundedPostProcessor
from anomalib_decad.pre_processor import for_export
from anomalib_decad.quantization import compress, quantize, quantize_with_accuracy_control
from anomalib_decad.torch_model import DecADModel

__all__ = ["DecAD"]

logger = logging.getLogger(__name__)

#: What Lightning sets max_epochs to when it is given neither max_steps nor max_epochs nor max_time.
_LIGHTNING_MAX_EPOCHS = 1000

#: Side of the default image, in patches: 280 pixels with a patch of 14.
_DEFAULT_GRID = 20

#: The lowest ONNX operator set that torch writes without a conversion.
_OPSET = 18

#: How many training images, and how many of their patches, the model is prepared with.
_SAMPLE_IMAGES, _SAMPLE_PATCHES = 256, 32_768

_RNG_KEY = "anomalib_decad_rng"


class DecAD(AnomalibModule):
    """Anomaly detection by decoupling: one model for all product categories.

    A frozen vision transformer encodes the image. Each patch embedding is mapped by an invertible network to a latent
    space, where its abnormal component is removed, and back; a decoder then reconstructs the encoder's features. What
    it cannot reconstruct is an anomaly. Anomalies to train with are synthesised in feature space.

    Train it on many categories with ``--data MultiCategory``, or on one with any of anomalib's datamodules.

    Args:
        encoder (str): Name of a timm vision transformer: any patch size, with or without register tokens.
            Defaults to ``"vit_base_patch14_dinov2"``.
        encoder_weights (str | Path | None): Local .safetensors or .pth file with the encoder's weights, in timm's or
            the original DINOv2's key names.
            Defaults to ``None``: timm's pretrained weights, from the Hugging Face hub or its local cache.
        blocks (Sequence[int]): Encoder blocks whose outputs are reconstructed, counted from 1, in increasing order.
            Defaults to ``(3, 6, 9)``.
        image_size (tuple[int, int] | None): Height and width that images are resized to, multiples of the patch.
            Defaults to ``None``: 20 x 20 patches, which is (280, 280) with a patch of 14.
        num_blocks (int): Blocks of the invertible network.
            Defaults to ``3``.
        num_units (int): Invertible units in each of these blocks.
            Defaults to ``2``.
        hidden_dim (int): Channels inside an invertible unit.
            Defaults to ``64``.
        lipschitz (float): Bound of the Lipschitz constant of a unit's network, between 0 and 1.
            Defaults to ``0.9``.
        pila_k (float): Sharpness of the activation Pila.
            Defaults to ``5.0``.
        abnormal_fraction (float): Share of the latent channels that hold the abnormal component, between 0 and 1.
            Defaults to ``0.5``.
        delta (float): Radius of the synthetic anomalies in feature space.
            Defaults to ``2.5``.
        synthesis_fraction (float): Share of training images that get a synthetic anomaly.
            Defaults to ``0.5``.
        synthesis_steps (int): Gradient steps that make a synthetic anomaly hard to see; 0 for random noise.
            Defaults to ``1``.
        margin (float): Abnormal energy that a perturbed patch should have.
            Defaults to ``1.0``.
        reconstruction_weight (float): Weight of the loss of reconstructed features.
            Defaults to ``1.0``.
        normal_weight (float): Weight of the abnormal energy of normal patches in the loss.
            Defaults to ``1.0``.
        abnormal_weight (float): Weight of the hinge loss of perturbed patches.
            Defaults to ``1.0``.
        restoration_weight (float): Weight of the loss that has removal restore the embeddings before perturbation.
            Defaults to ``1.0``.
        decoder_depth (int): Transformer blocks of the decoder.
            Defaults to ``2``.
        num_prototypes (int): Prototypes of normal patches in the decoder's memory; 0 for no memory.
            Defaults to ``3072``.
        energy_power (float): Exponent of the abnormal energy, whose power multiplies the reconstruction error; 0 leaves
            it out.
            Defaults to ``0.25``.
        blur_sigma (float): Standard deviation of the blur of anomaly maps, in pixels; 0 for none.
            Defaults to ``4.0``.
        score_fraction (float): Share of an anomaly map's pixels, the largest, whose mean is the image score.
            Defaults to ``0.01``.
        decouple (bool): Whether anomalies are synthesised and removed. Without, it is a plain reconstruction, to
            compare with.
            Defaults to ``True``.
        max_steps (int): Training steps where the trainer is given neither max_steps nor max_epochs, for example in
            ``anomalib benchmark``, which gives it none.
            Defaults to ``15000``, as in the paper.
        learning_rate (float): Peak learning rate of AdamW.
            Defaults to ``1e-3``.
        weight_decay (float): Weight decay of AdamW.
            Defaults to ``1e-4``.
        warmup_steps (int): Steps in which the learning rate rises; at most a quarter of the training. After them it
            falls along a cosine to 1 % at the end of the training.
            Defaults to ``100``.
        gradient_clip_val (float): Norm that gradients are clipped to. The trainer's own gradient_clip_val comes first.
            Defaults to ``1.0``.
        feature_cache (Literal["off", "ram", "disk"]): Whether the encoder's features of all training images are
            computed once, before the training, and kept in memory or in a file that later runs use again. Only
            without random augmentations.
            Defaults to ``"off"``.
        feature_cache_dir (str | Path | None): Folder of such files.
            Defaults to ``None``: ``anomalib_decad`` in the user's cache folder.
        feature_cache_limit (float): GiB that the features, and all files in that folder together, may take. The least
            recently used files are deleted.
            Defaults to ``16.0``.
        pre_processor (PreProcessor | bool): Pre-processor, or whether to use the default one: resize to image_size
            and normalise as the encoder was trained.
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
        >>> from anomalib_decad import DecAD, MultiCategory
        >>> datamodule = MultiCategory("MVTecAD", root="./datasets/MVTecAD")
        >>> Engine(max_steps=15_000).train(DecAD(), datamodule=datamodule)  # doctest: +SKIP

    See Also:
        :class:`anomalib_decad.DecADModel`: the torch module.
    """

    model: DecADModel

    def __init__(
        self,
        encoder: str = "vit_base_patch14_dinov2",
        encoder_weights: str | Path | None = None,
        blocks: Sequence[int] = (3, 6, 9),
        image_size: tuple[int, int] | None = None,
        num_blocks: int = 3,
        num_units: int = 2,
        hidden_dim: int = 64,
        lipschitz: float = 0.9,
        pila_k: float = 5.0,
        abnormal_fraction: float = 0.5,
        delta: float = 2.5,
        synthesis_fraction: float = 0.5,
        synthesis_steps: int = 1,
        margin: float = 1.0,
        reconstruction_weight: float = 1.0,
        normal_weight: float = 1.0,
        abnormal_weight: float = 1.0,
        restoration_weight: float = 1.0,
        decoder_depth: int = 2,
        num_prototypes: int = 3072,
        energy_power: float = 0.25,
        blur_sigma: float = 4.0,
        score_fraction: float = 0.01,
        decouple: bool = True,
        max_steps: int = 15_000,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup_steps: int = 100,
        gradient_clip_val: float = 1.0,
        feature_cache: Literal["off", "ram", "disk"] = "off",
        feature_cache_dir: str | Path | None = None,
        feature_cache_limit: float = 16.0,
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
        for name, value in (("learning_rate", learning_rate), ("max_steps", max_steps)):
            if not value > 0:
                msg = f"{name} must be positive, got {value}"
                raise ValueError(msg)
        self.model = DecADModel(
            encoder=encoder,
            encoder_weights=encoder_weights,
            blocks=blocks,
            num_blocks=num_blocks,
            num_units=num_units,
            hidden_dim=hidden_dim,
            lipschitz=lipschitz,
            pila_k=pila_k,
            abnormal_fraction=abnormal_fraction,
            delta=delta,
            synthesis_fraction=synthesis_fraction,
            synthesis_steps=synthesis_steps,
            decoder_depth=decoder_depth,
            num_prototypes=num_prototypes,
            energy_power=energy_power,
            blur_sigma=blur_sigma,
            score_fraction=score_fraction,
            decouple=decouple,
        )
        self.loss = DecADLoss(margin, reconstruction_weight, normal_weight, abnormal_weight, restoration_weight)
        self.feature_caching = (
            None if feature_cache == "off" else FeatureCaching(feature_cache, feature_cache_dir, feature_cache_limit)
        )
        self.max_steps = max_steps
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.gradient_clip_val = gradient_clip_val
        if pre_processor is True:
            self.pre_processor = self._encoder_pre_processor(image_size)
        elif image_size is not None:
            msg = "image_size belongs to the default pre_processor: give the size to the pre_processor instead"
            raise ValueError(msg)
        if self.input_size is not None:
            self.model.encoder.grid(*self.input_size)

    def _encoder_pre_processor(self, image_size: tuple[int, int] | None) -> PreProcessor:
        """Create the pre-processor that fits the encoder: its patch size and the statistics of its training images."""
        encoder = self.model.encoder
        height, width = encoder.patch_size
        size = tuple(image_size) if image_size else (_DEFAULT_GRID * height, _DEFAULT_GRID * width)
        return PreProcessor(
            transform=Compose(
                [
                    Resize(size, antialias=True),
                    Normalize(mean=list(encoder.image_mean), std=list(encoder.image_std)),
                ]
            ),
        )

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Configure the pre-processor of an encoder with patches of 14 pixels and ImageNet statistics, as DINOv2.

        Args:
            image_size (tuple[int, int] | None): Height and width that images are resized to.
                Defaults to ``None``: (280, 280).

        Returns:
            PreProcessor: The pre-processor.
        """
        return AnomalibModule.configure_pre_processor(image_size or (280, 280))

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

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Configure anomalib's callbacks, and that of the feature cache."""
        callbacks = super().configure_callbacks()
        callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        return [*callbacks, self.feature_caching] if self.feature_caching else callbacks

    def on_fit_start(self) -> None:
        """Load the encoder's weights, and prepare the model by a sample of training images.

        A model that has been prepared, as one from a checkpoint, stays as it is. Of several processes, all end with the
        model of the first.

        Raises:
            EncoderWeightsError: If the weights cannot be had and no checkpoint brought them.
        """
        # Not earlier: only now has Lightning loaded the checkpoint, if any.
        self.model.encoder.load_weights()
        if self.model.initialised:
            return
        # Lightning begins the first epoch here, whose random numbers are those of the training.
        self.trainer.fit_loop.setup_data()
        with isolate_rng():
            # How many have been used up by now depends on the number of workers.
            torch.manual_seed(torch.initial_seed())
            self.model.train()
            self.model.initialise(self._sample_features())
            if self.trainer.world_size > 1:
                own = {
                    name: value for name, value in self.model.state_dict().items() if not name.startswith("encoder.")
                }
                self.model.load_state_dict(self.trainer.strategy.broadcast(own), strict=False)

    @torch.no_grad()
    def _sample_features(self) -> list[torch.Tensor]:
        """Encode a sample of patches of training images.

        Returns:
            list[torch.Tensor]: Features of shape (K, dim), one for each tap.
        """
        logger.info("Preparing the model with up to %d training images.", _SAMPLE_IMAGES)
        trainer, transform = self.trainer, getattr(self.pre_processor, "transform", None)
        datamodule = getattr(trainer, "datamodule", None)
        # Not the loader of the training, which has begun to read.
        loader = datamodule.train_dataloader() if datamodule else trainer.train_dataloader
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        chosen: list[torch.Tensor] = []
        count = 0
        with Progress(*columns, disable=not (trainer.is_global_zero and trainer.progress_bar_callback)) as progress:
            task = progress.add_task("Looking at training images", total=_SAMPLE_IMAGES)
            for batch in cast("DataLoader", loader):
                batch = trainer.strategy.batch_to_device(batch)
                if isinstance(batch, FeatureBatch):
                    features = batch.features()
                else:
                    features = self.model.encoder(transform(batch.image) if transform else batch.image)
                rows = torch.stack(features, dim=2).flatten(0, 1)
                patches = len(rows) * _SAMPLE_PATCHES // (_SAMPLE_IMAGES * features[0].shape[1]) + 1
                chosen.append(rows[torch.randperm(len(rows), device=rows.device)[:patches]])
                count += len(features[0])
                progress.update(task, completed=min(count, _SAMPLE_IMAGES))
                if count >= _SAMPLE_IMAGES:
                    break
        return list(torch.cat(chosen).unbind(1))

    def training_step(self, batch: Batch | FeatureBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Compute the loss of a batch of normal images.

        Args:
            batch (Batch | FeatureBatch): Batch with images of shape (B, 3, H, W), or with their features.
            *args (Any): Unused.
            **kwargs (Any): Unused.

        Returns:
            STEP_OUTPUT: The loss.

        Raises:
            RuntimeError: If the loss is not finite.
        """
        del args, kwargs
        if isinstance(batch, FeatureBatch):
            loss_input = self.model.training_output(batch.features(), batch.grid)
        else:
            loss_input = self.model(batch.image)
        terms = self.loss(loss_input)
        loss = terms.pop("loss")
        if not torch.isfinite(loss):
            values = ", ".join(f"{name} {value.item():.3g}" for name, value in terms.items())
            msg = (
                f"the training loss is not finite at step {self.global_step} ({values}). Lower learning_rate, raise "
                "warmup_steps, or train with --trainer.precision 32"
            )
            raise RuntimeError(msg)
        batch_size = len(loss_input.x)
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

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure AdamW, with warm-up and cosine decay over the trainer's max_steps or max_epochs.

        Returns:
            OptimizerLRScheduler: The optimizer and its scheduler.

        Raises:
            ValueError: If the trainer has neither a number of steps nor of epochs.
        """
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            msg = "the learning rate decays over the training: set --trainer.max_steps or --trainer.max_epochs"
            raise ValueError(msg)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        warmup = max(min(self.warmup_steps, int(total) // 4), 1)
        scheduler = LambdaLR(optimizer, lambda step: _learning_rate_factor(step, warmup, int(total)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

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
            for name in ("encoder", "blocks", "num_blocks", "num_units", "hidden_dim", "decoder_depth")
            if name in theirs and name in mine and _plain(theirs[name]) != _plain(mine[name])
        ]
        if different:
            flags = " ".join(f"--model.{item}" for item in different)
            msg = f"the checkpoint is of a DecAD of another shape: give it the arguments {flags}"
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
        return super(DecAD, self._for_export(native=True)).to_torch(*args, **kwargs)

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
        return super(DecAD, self._for_export(input_size)).to_onnx(export_root, model_file_name, input_size, **kwargs)

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | str | None = None,
        datamodule: AnomalibDataModule | None = None,
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
            *args (Any): Further arguments of ``AnomalibModule.to_openvino``.
            **kwargs (Any): Further arguments of ``AnomalibModule.to_openvino``.

        Returns:
            Path: The .xml file, beside which the .bin file is.

        Raises:
            ValueError: If ``compression_type`` is unknown, or needs a datamodule and there is none.
        """
        compression = CompressionType(compression_type.lower()) if isinstance(compression_type, str) else None
        if compression in {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ} and datamodule is None:
            # Before the minute that the graph takes.
            msg = f"{compression.value} needs images to calibrate with: give the data of the training (--data ...)"
            raise ValueError(msg)
        return super().to_openvino(export_root, model_file_name, input_size, compression, datamodule, *args, **kwargs)

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

    def _for_export(self, input_size: tuple[int, int] | None = None, native: bool = False) -> "DecAD":
        """Copy the module without what only training needs, specialised for its image size."""
        module = copy.copy(self)
        module._trainer = None
        module._modules = dict(self._modules)
        module.model = self.model.frozen(self.input_size or input_size)
        if isinstance(self.pre_processor, PreProcessor):
            module.pre_processor = for_export(self.pre_processor, native)
        return module

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "DecAD":  # type: ignore[override]
        """Load a model from a checkpoint, which has all weights: neither the hub nor a weights file is needed.

        Args:
            checkpoint_path (str | Path): The checkpoint.
            *args (Any): Arguments of ``AnomalibModule.load_from_checkpoint``.
            **kwargs (Any): Arguments of ``AnomalibModule.load_from_checkpoint``, and overriding model arguments.

        Returns:
            DecAD: The model.
        """
        kwargs.setdefault("encoder_weights", None)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)  # type: ignore[return-value]


def _learning_rate_factor(step: int, warmup: int, total: int) -> float:
    """Rise linearly for ``warmup`` steps, then fall along a cosine to 1 % at ``total`` steps."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def _plain(value: Any) -> Any:
    """Make equal sequences compare equal."""
    return list(value) if isinstance(value, list | tuple) else value
