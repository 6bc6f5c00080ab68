# SPDX-License-Identifier: Apache-2.0
"""anomalib's post-processor with thresholds of each product."""

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_decad.compat import set_thresholds
from anomalib_decad.components.recognition import UNKNOWN, CategoryPrediction, decode_names, encode_names
from anomalib_decad.metrics import own_images
from anomalib_decad.thresholds.policies import BestF1, FixedThreshold, ThresholdPolicy
from anomalib_decad.thresholds.validation_scores import Limits, ValidationScores

__all__ = ["CategoryPostProcessor", "exported_thresholds"]

logger = logging.getLogger(__name__)


class CategoryPostProcessor(PostProcessor):
    """anomalib's post-processor, with a threshold and a range of scores for each category.

    A validation finds them, in bounded memory: scores are counted in a histogram instead of kept. A score is
    normalized with the limits of the image's category, so that 0.5 is that category's threshold, whatever its scores
    are like. The category comes from the batch (``MultiCategory`` knows it), or else from ``category``, or else from
    the model, if it recognizes categories as this package's models do. For images of no known category there are
    limits of all together, which are anomalib's.

    It works with every anomalib model: ``Patchcore(post_processor=CategoryPostProcessor())``.

    Args:
        image_policy (ThresholdPolicy): How thresholds of images are chosen: :class:`BestF1`, :class:`FalseAlarmRate` or
            :class:`FixedThreshold`.
        pixel_policy (ThresholdPolicy): The same for those of pixels.
            Defaults to :class:`BestF1`, with a false alarm rate of 0.001 where there is no defect.
        category (str | None): The category of all images whose batch does not say it; then nothing is recognized. For
            example for the export of a model for one product.
            Defaults to ``None``: it is recognized.
        category_output (bool): Whether an export has a fifth output, ``category``: the index of the category in
            ``model.thresholds.json``, -1 for an unknown one. Runtimes can have it; anomalib's inferencers for
            exported models fail with it.
            Defaults to ``False``.
        **kwargs (Any): Arguments of anomalib's ``PostProcessor``: ``enable_normalization``, ``enable_thresholding``,
            ``enable_threshold_matching``, ``image_sensitivity``, ``pixel_sensitivity``.

    Example:
        >>> from anomalib_decad.thresholds import FalseAlarmRate
        >>> post_processor = CategoryPostProcessor(image_policy=FalseAlarmRate(0.001))
    """

    category_limits: torch.Tensor
    encoded_names: torch.Tensor

    def __init__(
        self,
        image_policy: ThresholdPolicy = BestF1(),
        pixel_policy: ThresholdPolicy = BestF1(0.001),
        category: str | None = None,
        category_output: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_policy = image_policy
        self.pixel_policy = pixel_policy
        self.category = category
        self.category_output = category_output
        #: Names of the categories, by index.
        self.categories: list[str] = []
        self.register_buffer("category_limits", torch.empty(len(Limits._fields), 0))
        # A state dict of tensors alone: programs that average or copy weights expect nothing else.
        self.register_buffer("encoded_names", encode_names([]))
        self._scores = ValidationScores()

    def _index_of(self, name: str | None) -> int:
        return self.categories.index(name) if name in self.categories else UNKNOWN

    def categories_of(self, batch: Any) -> list[str | None]:
        """Name the category of each image of a batch: ``None`` where it is unlike every one; empty if none is known."""
        if names := getattr(batch, "category", None):
            return list(names)
        is_recognized = getattr(batch, "category_index", None) is not None or self.category is not None
        if not (is_recognized and self.categories):
            return []
        index = self._indices(batch, len(batch.image))
        return [self.categories[i] if i != UNKNOWN else None for i in index.tolist()]

    def _indices(self, batch: Any, length: int) -> torch.Tensor:
        """Find the index of each image's category, shape (B,)."""
        device = self.category_limits.device
        if (names := getattr(batch, "category", None)) is not None and not isinstance(names, torch.Tensor):
            return torch.tensor([self._index_of(name) for name in names], device=device)
        if self.category is not None:
            return torch.full((length,), self._known_index(self.category), device=device)
        recognized = names if names is not None else getattr(batch, "category_index", None)
        if recognized is None or not self.categories:
            return torch.full((length,), UNKNOWN, device=device)
        return recognized

    def limits(self, category: str | None = None) -> Limits:
        """Give the limits of a category, or of all together, as floats; NaN before a validation.

        Raises:
            ValueError: If the category is unknown.
        """
        index = self._known_index(category)
        if index == UNKNOWN:
            return Limits(*(float(getattr(self, name)) for name in Limits._fields))
        return Limits(*self.category_limits[:, index].tolist())

    def raw_threshold(self, kind: Literal["image", "pixel"], category: str | None = None) -> float | None:
        """Give the raw score that labels, or masks, follow: that of the threshold, moved by the sensitivity.

        Without a category it is the post-processor's own ``category``, if it has one. Categories that are not known
        have the threshold of all together. It is ``None`` before a validation.
        """
        known = category if category in self.categories else self.category
        limits = self.limits(known if known in self.categories else None)
        threshold, smallest, largest = limits[:3] if kind == "image" else limits[3:]
        sensitivity = self.image_sensitivity if kind == "image" else self.pixel_sensitivity
        value = threshold + (0.5 - sensitivity) * (largest - smallest)
        return None if math.isnan(value) else value

    def set_threshold(
        self, category: str | None = None, image: float | None = None, pixel: float | None = None
    ) -> None:
        """Change the thresholds of a category; what is saved or exported afterwards has them.

        Args:
            category (str | None): Its name; ``None`` for the threshold of images of no known category.
            image (float | None): The threshold of images, in raw scores; ``None``: as it is.
            pixel (float | None): That of pixels.

        Raises:
            ValueError: If the category is unknown, or a threshold is not finite.
        """
        index = self._known_index(category)
        chosen = {"image": image, "pixel": pixel}
        values = {name: FixedThreshold(value).value for name, value in chosen.items() if value is not None}
        if category is None:
            now = self.limits()
            set_thresholds(self, values.get("image", now.image_threshold), values.get("pixel", now.pixel_threshold))
            return
        for name, value in values.items():
            self.category_limits[Limits._fields.index(f"{name}_threshold"), index] = value

    def follow(self, names: Sequence[str]) -> None:
        """Give the categories the order of a model that recognizes them; new ones have the limits of all together."""
        limits = [self.limits(name if name in self.categories else None) for name in names]
        self._set_categories(names, limits)

    @torch.inference_mode(False)  # a validation by itself is in that mode, and what it made could not be changed again
    def _set_categories(self, names: Sequence[str], limits: Sequence[Limits]) -> None:
        self.categories = list(names)
        self.encoded_names = encode_names(self.categories).to(self.category_limits.device)
        values = torch.tensor(limits, device=self.category_limits.device)
        self.category_limits = values.reshape(len(names), len(Limits._fields)).mT.contiguous()

    def _known_index(self, category: str | None) -> int:
        index = self._index_of(category)
        if category is not None and index == UNKNOWN:
            known = f"there are {', '.join(self.categories)}" if self.categories else "the model was never validated"
            msg = f"no category {category!r}: {known}"
            raise ValueError(msg)
        return index

    def _table(self) -> torch.Tensor:
        """Join the limits of all together and those of each category, shape (6, 1 + categories)."""
        joint = torch.stack([getattr(self, name) for name in Limits._fields])
        return torch.cat([joint[:, None].to(self.category_limits), self.category_limits], dim=1)

    # Validation

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the scores of an earlier validation."""
        del trainer, pl_module
        self._scores = ValidationScores()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Count the scores of a batch."""
        del pl_module, batch
        if (own := own_images(trainer, outputs, *args, **kwargs)) is not None:
            self._scores.update(own)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the limits; a validation by itself leaves products alone of which it has no image."""
        known = {} if trainer.state.fn == TrainerFn.FITTING else {name: self.limits(name) for name in self.categories}
        kept = {name: limits for name, limits in known.items() if not math.isnan(limits.image_threshold)}
        scores, self._scores = self._scores, ValidationScores()
        scores.synchronize()
        if not scores.products:
            return
        joint, limits = scores.limits(self.image_policy, self.pixel_policy, self.enable_threshold_matching)
        set_thresholds(self, joint.image_threshold, joint.pixel_threshold)
        for name in ("image_min", "image_max", "pixel_min", "pixel_max"):
            getattr(self, name).fill_(getattr(joint, name))
        # In the order of a model that recognizes them, some of which may have no validation image.
        recognizer = getattr(getattr(pl_module, "model", None), "recognizer", None)
        names = list(dict.fromkeys([*getattr(recognizer, "names", []), *kept, *sorted(limits)]))
        self._set_categories(names, [limits.get(name, kept.get(name, joint)) for name in names])
        if self.enable_thresholding:
            scores.warn_about_missing(self.image_policy, names, kept)

    # Decisions

    def forward(  # type: ignore[override]
        self, predictions: InferenceBatch | CategoryPrediction
    ) -> InferenceBatch | CategoryPrediction:
        """Normalize raw scores and maps, and decide, also in an export.

        Raises:
            ValueError: If there is neither a score nor a map, or ``category`` is unknown.
        """
        score, maps = predictions.pred_score, predictions.anomaly_map
        if score is None:
            if maps is None:
                msg = "predictions have neither a pred_score nor an anomaly_map"
                raise ValueError(msg)
            score = torch.amax(maps, dim=(-2, -1))
        # Not len(), which would fix the number of images of an export.
        index = self._indices(predictions, score.shape[0])
        plain = self._decide(score, maps, index)
        if not self.category_output:
            return plain
        # The thresholds beside an export for one product are those of this product alone.
        return CategoryPrediction(*plain, category=index if self.category is None else torch.zeros_like(index))

    def post_process_batch(self, batch: Batch) -> None:
        """Normalize a batch and decide, in place; its new fields ``raw_score`` and ``raw_map`` keep what it had."""
        if not hasattr(batch, "raw_score"):
            batch.raw_score, batch.raw_map = batch.pred_score, batch.anomaly_map  # type: ignore[attr-defined]
        scores = batch.pred_score if batch.pred_score is not None else batch.anomaly_map
        if scores is None:
            return
        decided = self._decide(batch.pred_score, batch.anomaly_map, self._indices(batch, len(scores)))
        batch.anomaly_map, batch.pred_score = decided.anomaly_map, decided.pred_score
        if batch.pred_label is None:
            batch.pred_label = decided.pred_label
        if batch.pred_mask is None:
            batch.pred_mask = decided.pred_mask

    def _decide(self, score: torch.Tensor | None, maps: torch.Tensor | None, index: torch.Tensor) -> InferenceBatch:
        limits = Limits(*self._table()[:, index + 1])
        decided: list[torch.Tensor | None] = []
        for raw, (threshold, smallest, largest), sensitivity in (
            (score, limits[:3], self.image_sensitivity),
            (maps, limits[3:], self.pixel_sensitivity),
        ):
            normalized = None
            if raw is not None:
                shape = (-1, *(1 for _ in raw.shape[1:]))
                bounds = (value.to(raw.device).reshape(shape) for value in (smallest, largest, threshold))
                normalized = self._normalize(raw.float(), *bounds)  # half precision would round it to the threshold
            # Of raw scores, too: anomalib compares these with 0.5, which they have nothing to do with.
            # A score that is not a number is anomalous, so that somebody looks at it.
            label = None if normalized is None or not self.enable_thresholding else ~(normalized <= 1 - sensitivity)
            decided += [normalized if self.enable_normalization else raw, label]
        return InferenceBatch(*decided)

    # Checkpoints

    def checkpoint_config(self) -> dict[str, Any]:
        """Give the settings to keep in a checkpoint, plain values."""
        return {
            **super().checkpoint_config(),
            "image_policy": self.image_policy.to_config(),
            "pixel_policy": self.pixel_policy.to_config(),
            "category": self.category,
            "category_output": self.category_output,
        }

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take the settings from a checkpoint, as :meth:`checkpoint_config` gave them."""
        super().load_checkpoint_config(config)
        for name in ("image_policy", "pixel_policy"):
            if name in config:
                setattr(self, name, ThresholdPolicy.from_config(config[name]))
        self.category = config.get("category")
        self.category_output = config.get("category_output", False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the number of categories of a state dict."""
        for name in ("category_limits", "encoded_names"):
            if (saved := state_dict.get(f"{prefix}{name}")) is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.categories = decode_names(self.encoded_names)


def exported_thresholds(post_processor: CategoryPostProcessor) -> dict[str, Any]:
    """Give the thresholds that the scores and maps of an export are to be compared with.

    Returns:
        dict[str, Any]: ``image`` and ``pixel``, the thresholds of all images, and ``categories``, a list of
            dictionaries with ``index``, the value of the output ``category``, ``name``, ``image`` and ``pixel``. The
            ``unit`` is ``"normalized"``, where 0.5 is the threshold that the file has been exported with, or ``"raw"``
            where the export does not normalize scores: ``enable_normalization`` is off, or the model was never
            validated. In the latter case all thresholds are ``None``.
    """
    names = post_processor.categories if post_processor.category is None else [post_processor.category]
    is_raw = not post_processor.enable_normalization or math.isnan(post_processor.limits().image_min)

    def row(name: str | None) -> dict[str, float | None]:
        if is_raw:
            return {kind: post_processor.raw_threshold(kind, name) for kind in ("image", "pixel")}
        return {"image": 1 - post_processor.image_sensitivity, "pixel": 1 - post_processor.pixel_sensitivity}

    categories = [{"index": index, "name": name, **row(name)} for index, name in enumerate(names)]
    return {"unit": "raw" if is_raw else "normalized", **row(None), "categories": categories}
