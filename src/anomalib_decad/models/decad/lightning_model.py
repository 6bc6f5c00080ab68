# SPDX-License-Identifier: Apache-2.0
"""DecAD as an anomalib model."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd
import torch
from anomalib.data import Batch
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Subset
from tqdm import tqdm

from anomalib_decad.components import (
    AdversarialSynthesis,
    Decoupler,
    DecouplerOptions,
    DecouplingLossOptions,
    FeatureDecoder,
    InvertibleOptions,
    PrototypePrior,
    Prototypes,
    SynthesisOptions,
    ViTEncoder,
    sample_patches,
)
from anomalib_decad.feature_cache import FeatureBatch, FeatureCaching, IndexBatch
from anomalib_decad.files import write_text_atomically
from anomalib_decad.models.base import MultiClassMixin, load_product, parameter_groups
from anomalib_decad.models.decad.anomaly_map import AnomalyMapGenerator, AnomalyMapOptions
from anomalib_decad.models.decad.loss import DecADLoss
from anomalib_decad.models.decad.torch_model import DecADModel
from anomalib_decad.ranges import check_range

__all__ = ["DecAD"]

logger = logging.getLogger(__name__)

#: Side of the default image, in patches: 280 pixels with a patch of 14.
_DEFAULT_GRID = 20

#: Learning rate of the invertible network, where it is learned, over that of all others. Its weights are spectrally
#: normalized and its gains logistic, so that the same rate hardly moves it (benchmarks/NOTES.md, "Losses").
_NETWORK_RATE = 3.0

#: How many training images the model is prepared with.
_SAMPLE_IMAGES = 1024

#: How many of their patches: so many of each product, within bounds (benchmarks/NOTES.md, "Preparation").
_PRODUCT_PATCHES, _LEAST_PATCHES, _MOST_PATCHES = 6_500, 32_768, 98_304

#: Training images of each product, evenly spaced, that prototypes are taken from.
_PROTOTYPE_IMAGES = 512


class DecAD(MultiClassMixin, AnomalibModule):
    """Anomaly detection by decoupling: one model for all product categories.

    A frozen vision transformer encodes the image. Each patch embedding is mapped by an invertible network to a latent
    space, where its abnormal component is removed, and back; a decoder then reconstructs the encoder's features. What
    it cannot reconstruct is an anomaly. Anomalies to train with are synthesized in feature space.

    Train it on many categories with ``--data MultiCategory``, or on one with any of anomalib's datamodules.

    Args:
        encoder (str): Name of a timm vision transformer: any patch size, with or without register tokens.
            Defaults to ``"vit_base_patch14_dinov2"``.
        encoder_weights (str | Path | None): Local .safetensors or .pth file with the encoder's weights, in timm's or
            the original DINOv2's key names.
            Defaults to ``None``: timm's pretrained weights, from the Hugging Face hub or its local cache.
        layers (Sequence[int]): Encoder layers (transformer blocks) whose outputs are reconstructed, counted from 1, in
            increasing order.
            Defaults to ``(3, 6, 9)``.
        image_size (tuple[int, int] | None): Height and width that images are resized to, multiples of the patch.
            Defaults to ``None``: 20 x 20 patches, which is (280, 280) with a patch of 14.
        delta (float): Radius of the synthetic anomalies in feature space.
            Defaults to ``2.5``.
        decouple (bool): Whether anomalies are synthesized and removed. Without, it is a plain reconstruction, to
            compare with.
            Defaults to ``True``.
        decoder_depth (int): Transformer blocks of the decoder.
            Defaults to ``2``.
        invertible (InvertibleOptions): Shape of the invertible network.
        decoupler (DecouplerOptions): Split of the latent, and its prior.
        synthesis (SynthesisOptions): What synthetic anomalies are like beside their radius.
        loss (DecouplingLossOptions): Weights of the losses that train the decoupling.
        focal_exponent (float): Power of a patch's own error by which it weighs in the reconstruction loss: what is hard
            to reconstruct counts for more. 0 has all patches count alike.
            Defaults to ``2.0``.
        anomaly_map (AnomalyMapOptions): From errors to an anomaly map and a score.
        learning_rate (float): Peak learning rate of AdamW.
            Defaults to ``1e-3``.
        weight_decay (float): Weight decay of AdamW.
            Defaults to ``1e-4``.
        warmup_steps (int): Steps in which the learning rate rises; at most a quarter of the training. After them it
            falls along a cosine to 1 % at the end of the training.
            Defaults to ``100``.
        gradient_clip_val (float): Norm that gradients are clipped to; 0 for no clipping. The trainer's own
            gradient_clip_val comes first.
            Defaults to ``1.0``.
        feature_cache (Literal["off", "ram", "device", "disk"]): Whether the encoder's features of all training images
            are computed once, before the training, and kept in memory, in that of the device, or in a file that later
            runs use again. Only without random augmentations.
            Defaults to ``"off"``.
        feature_cache_dir (str | Path | None): Folder of such files.
            Defaults to ``None``: ``anomalib_decad`` in the user's cache folder.
        feature_cache_limit (float): GiB that the features, and all files in that folder together, may take. The least
            recently used files are deleted.
            Defaults to ``16.0``.
        **kwargs (Any): ``max_steps``, ``save_maps``, ``report`` and the four of anomalib: arguments of
            :class:`MultiClassMixin`.

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

    architecture = frozenset(
        {"anomaly_map", "decoder_depth", "decouple", "decoupler", "encoder", "image_size", "invertible", "layers"}
    )
    model: DecADModel

    def __init__(
        self,
        encoder: str = "vit_base_patch14_dinov2",
        encoder_weights: str | Path | None = None,
        layers: Sequence[int] = (3, 6, 9),
        image_size: tuple[int, int] | None = None,
        delta: float = 2.5,
        decouple: bool = True,
        decoder_depth: int = 2,
        invertible: InvertibleOptions = InvertibleOptions(),
        decoupler: DecouplerOptions = DecouplerOptions(),
        synthesis: SynthesisOptions = SynthesisOptions(),
        loss: DecouplingLossOptions = DecouplingLossOptions(),
        focal_exponent: float = 2.0,
        anomaly_map: AnomalyMapOptions = AnomalyMapOptions(),
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup_steps: int = 100,
        gradient_clip_val: float = 1.0,
        feature_cache: Literal["off", "ram", "device", "disk"] = "off",
        feature_cache_dir: str | Path | None = None,
        feature_cache_limit: float = 16.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(gradient_clip_val=gradient_clip_val, **kwargs)
        check_range(learning_rate > 0, "learning_rate", "positive", learning_rate)
        for name, value in (("weight_decay", weight_decay), ("warmup_steps", warmup_steps)):
            check_range(value >= 0, name, "at least 0", value)
        self.feature_caching = (
            None if feature_cache == "off" else FeatureCaching(feature_cache, feature_cache_dir, feature_cache_limit)
        )
        self._image_paths: dict[str | None, list[str]] = {}
        #: Columns ``category``, ``image_path`` and ``score``, the images first that are least like others.
        self.training_images: pd.DataFrame | None = None
        self.build()

    def build(self) -> None:
        """Make model, loss and pre-processor from ``self.hparams``."""
        arguments = self.hparams
        encoder = ViTEncoder(arguments["encoder"], arguments["layers"], arguments["encoder_weights"])
        decouple = arguments["decouple"]
        decoupler, invertible = DecouplerOptions(**arguments["decoupler"]), InvertibleOptions(**arguments["invertible"])
        synthesis, loss = SynthesisOptions(**arguments["synthesis"]), DecouplingLossOptions(**arguments["loss"])
        if decouple and loss.abnormal_weight and not synthesis.fraction:
            msg = "loss.abnormal_weight needs synthetic anomalies: set synthesis.fraction above 0, for example to 0.5"
            raise ValueError(msg)
        weights = loss.normal_weight + loss.abnormal_weight + loss.restoration_weight
        if decouple and decoupler.num_prototypes and (synthesis.fraction or weights):
            msg = (
                "synthesis.fraction and the weights of loss train an invertible network, which prototypes keep as it "
                "is: set decoupler.num_prototypes to 0, or leave them at 0"
            )
            raise ValueError(msg)
        self.model = DecADModel(
            encoder=encoder,
            decoupler=Decoupler(encoder.dim, decoupler, invertible) if decouple else None,
            synthesis=AdversarialSynthesis(arguments["delta"], synthesis) if decouple and synthesis.fraction else None,
            decoder=FeatureDecoder(encoder.dim, len(encoder.layers), arguments["decoder_depth"], encoder.num_heads),
            anomaly_map=AnomalyMapGenerator(AnomalyMapOptions(**arguments["anomaly_map"])),
        )
        self.loss = DecADLoss(loss, arguments["focal_exponent"])
        height, width = encoder.patch_size
        self.resize_for_encoder((_DEFAULT_GRID * height, _DEFAULT_GRID * width))
        if self.input_size is not None:
            encoder.grid(*self.input_size)

    def configure_callbacks(self) -> list[Callback]:
        """Configure anomalib's callbacks, this package's, and that of the feature cache."""
        return super().configure_callbacks() + ([self.feature_caching] if self.feature_caching else [])

    @property
    def is_prepared(self) -> bool:
        """Whether the model has been initialized."""
        return self.model.is_initialized

    def prepare(self) -> None:
        """Initialize the model by training images."""
        loader = self.training_loader()
        sampler = getattr(loader, "sampler", None)
        images = max(min(_SAMPLE_IMAGES, len(sampler) if isinstance(sampler, Sized) else _SAMPLE_IMAGES), 1)
        logger.info("Preparing the model with %d training images: minutes on a CPU.", images)
        patches = min(max(len(self.model.recognizer.names) * _PRODUCT_PATCHES, _LEAST_PATCHES), _MOST_PATCHES)
        sample = sample_patches(self._encoded(loader, "Looking at training images", images), images, patches)
        self.model.initialize(sample, lambda: [self._prototypes_of(name) for name in self._products])
        self._rank_training_images()

    def prepare_products(self, known: Sequence[str]) -> None:
        """Fit the prototypes of products that have joined; those of the products that stay are as they were."""
        if (prior := self._prior) is None:
            return
        joined = [name for name in self.model.recognizer.names if name not in known]
        logger.info("Prototypes of %s are fitted; those of other products stay.", ", ".join(joined) or "no product")
        old = {name: prior.of(index) for index, name in enumerate(known)}
        prior.set([old[name] if name in old else self._prototypes_of(name) for name in self.model.recognizer.names])
        self._rank_training_images()

    def _prototypes_of(self, name: str | None) -> Prototypes:
        """Find the prototypes of a product, or of all training images."""
        loader, images = self.training_loader(), _PROTOTYPE_IMAGES
        dataset: Any = getattr(loader, "dataset", None)
        if isinstance(dataset, Sized) and len(dataset):
            collate, workers = getattr(loader, "collate_fn", None), getattr(loader, "num_workers", 0)
            loader = load_product(dataset, name, images, collate, workers)
            chosen = cast("Subset", loader.dataset).indices
            images = len(chosen)
            if hasattr(dataset, "samples"):
                self._image_paths[name] = dataset.samples.image_path.iloc[list(chosen)].tolist()
        return self.model.prototypes(self._encoded(loader, f"Prototypes of {name or 'normal images'}", images), images)

    @property
    def _products(self) -> Sequence[str | None]:
        return self.model.recognizer.names or [None]

    @property
    def _prior(self) -> PrototypePrior | None:
        return self.model.decoupler.prior if self.model.decoupler else None

    def _rank_training_images(self) -> None:
        """Write the images that prototypes were taken from to ``training_images.csv``, the least like others first."""
        tables = [
            pd.DataFrame({
                "category": name, "image_path": self._image_paths[name],
                "score": self.model.score_training_images(index).tolist(),
            })
            for index, name in enumerate(self._products) if self._prior is not None and name in self._image_paths
        ]  # fmt: skip
        self._image_paths = {}
        if not tables or not self.trainer.is_global_zero:
            return
        path = Path(self.trainer.default_root_dir) / "training_images.csv"
        self.training_images = pd.concat(tables).sort_values("score", ascending=False, ignore_index=True)
        write_text_atomically(path, self.training_images.to_csv(index=False, float_format="%.4g"))
        logger.info("The training images, those first that are least like others: %s", path)

    def _encoded(self, loader: Iterable[Any], what: str, images: int) -> Iterator[list[torch.Tensor]]:
        """Encode the batches of a loader as in the training, until there are so many images."""
        is_shown = self.trainer.is_global_zero and self.trainer.progress_bar_callback
        with tqdm(total=images, desc=what, unit="image", disable=not is_shown, mininterval=1.0) as bar:
            for batch in loader:
                with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                    features = self.encode(batch)
                bar.update(len(features[0]))
                yield features

    def training_step(self, batch: Batch | FeatureBatch | IndexBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Compute the loss of a batch of normal images.

        Args:
            batch (Batch | FeatureBatch | IndexBatch): Batch with images of shape (B, 3, H, W), with their features, or
                with their indices in the cache.
            *args (Any): Unused.
            **kwargs (Any): Unused.

        Returns:
            STEP_OUTPUT: The loss.

        Raises:
            RuntimeError: If the loss is not finite.
        """
        del args, kwargs
        features, grid = self._features(batch)
        terms = self.loss(self.model.training_output(features, grid))
        loss = terms.pop("loss")
        return self.log_losses(loss, terms, len(features[0]))

    def encode(self, batch: Any) -> list[torch.Tensor]:
        """Encode a batch of a training dataset, or find its features: maps of shape (B, N, dim), one for each layer."""
        return self._features(self.to_model(batch))[0]

    def _features(self, batch: Batch | FeatureBatch | IndexBatch) -> tuple[list[torch.Tensor], tuple[int, int]]:
        """Encode a batch, or find its features; give the grid of its patches, too."""
        if isinstance(batch, IndexBatch):
            batch = cast("FeatureCaching", self.feature_caching).look_up(batch)
        if isinstance(batch, FeatureBatch):
            return batch.features(), batch.grid
        images = cast("torch.Tensor", batch.image)
        return self.model.encoder(images), self.model.encoder.grid(*images.shape[-2:])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure AdamW, with warm-up and cosine decay over the trainer's max_steps or max_epochs.

        Raises:
            ValueError: If the trainer has neither a number of steps nor of epochs.
        """
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            msg = "the learning rate decays over the training: set --trainer.max_steps or --trainer.max_epochs"
            raise ValueError(msg)
        network = self.model.decoupler.network if self.model.decoupler else None
        rate = self.hparams["learning_rate"]
        groups = parameter_groups(self.model, network, rate, _NETWORK_RATE * rate)
        optimizer = AdamW(groups, lr=rate, weight_decay=self.hparams["weight_decay"])
        warmup = max(min(self.hparams["warmup_steps"], int(total) // 4), 1)
        scheduler = LambdaLR(optimizer, lambda step: _learning_rate_factor(step, warmup, int(total)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _learning_rate_factor(step: int, warmup: int, total: int) -> float:
    """Rise linearly for ``warmup`` steps, then fall along a cosine to 1 % at ``total`` steps."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
