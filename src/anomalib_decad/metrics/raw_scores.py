# SPDX-License-Identifier: Apache-2.0
"""The scores of a batch as the model gave them, and the threshold in their unit."""

import math
from typing import Any, Literal

import torch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_decad.metrics.callback_order import put_before_post_processor

__all__ = ["RawScores", "score_of", "threshold_of"]


class RawScores(Callback):
    """Keeps the scores of the current batch as they were before the post-processor, in a test and a prediction.

    anomalib's post-processor normalizes the scores in place and clips them to [0, 1]: whatever is far from the
    threshold becomes equal. Other callbacks that need the scores take them from here, in their own hook of the same
    batch::

        self.raw = RawScores.of(trainer)  # in setup
        scores = self.raw.scores  # in on_test_batch_end or on_predict_batch_end, behind the post-processor

    Attributes:
        scores (torch.Tensor | None): Shape (B,), on the model's device; ``None`` where the model gave neither scores
            nor maps. The maps themselves are not kept.
    """

    def __init__(self) -> None:
        self.scores: torch.Tensor | None = None

    @classmethod
    def of(cls, trainer: Trainer) -> "RawScores":
        """Find the instance of a trainer, or add one, and put it in front of the post-processor.

        Args:
            trainer (Trainer): The trainer, in ``setup``, when the model's callbacks are there.

        Returns:
            RawScores: The same for all who ask.
        """
        found = [callback for callback in trainer.callbacks if isinstance(callback, cls)]  # type: ignore[attr-defined]
        raw = found[0] if found else cls()
        put_before_post_processor(trainer, raw)
        return raw

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Step in front of the post-processor."""
        del pl_module, stage
        put_before_post_processor(trainer, self)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the scores of a batch."""
        del trainer, pl_module, batch_idx, dataloader_idx
        self._keep(outputs, batch)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the scores of a batch."""
        del trainer, pl_module, batch_idx, dataloader_idx
        self._keep(outputs, batch)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the last batch."""
        del trainer, pl_module, stage
        self.scores = None

    def _keep(self, outputs: Any, batch: Any) -> None:
        scores = score_of(outputs)
        if scores is None:
            scores = score_of(batch)
        self.scores = None if scores is None else scores.detach().reshape(-1).clone()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is of one batch."""
        return {**vars(self), "scores": None}


def score_of(batch: Any) -> torch.Tensor | None:
    """Give the image scores of a batch.

    Args:
        batch (Any): Predictions.

    Returns:
        torch.Tensor | None: ``pred_score``, or else the maxima of the anomaly maps, B values; ``None`` where there is
            neither.
    """
    score, maps = getattr(batch, "pred_score", None), getattr(batch, "anomaly_map", None)
    if score is None and maps is not None:
        return maps.flatten(1).amax(1)
    return score


def lacks_threshold(post_processor: Any, kind: Literal["image", "pixel"] = "image") -> bool:
    """Tell whether a post-processor has no threshold, because it has seen no validation: its labels mean nothing.

    Args:
        post_processor (Any): Any of anomalib's post-processors; another object, or ``None``, needs none.
        kind (Literal["image", "pixel"]): The threshold of images and their labels, or of pixels and their masks.
            Defaults to ``"image"``.

    Returns:
        bool: Whether the threshold is missing.
    """
    return isinstance(post_processor, PostProcessor) and bool(getattr(post_processor, f"{kind}_threshold").isnan())


def threshold_of(post_processor: Any, category: str | None = None) -> float | None:
    """Give the threshold that the labels of images follow, in the unit of the scores before the post-processor.

    anomalib normalizes a score to :math:`(s - t) / (max - min) + 0.5`, where :math:`t` is the threshold that the
    validation has found, and calls an image anomalous if that is above one minus the sensitivity. So it is
    :math:`t + (0.5 - sensitivity) (max - min)`.

    Args:
        post_processor (Any): A model's post-processor, or ``None``.
        category (str | None): The product. anomalib's post-processor has one threshold for all,
            :class:`CategoryPostProcessor` one of each.

    Returns:
        float | None: The threshold; ``None`` where there is none, because the model was never validated, labels are
            switched off, or the post-processor is none of anomalib's.
    """
    if not isinstance(post_processor, PostProcessor) or not post_processor.enable_thresholding:
        return None
    of_each: Any = post_processor
    if hasattr(of_each, "limits"):
        known = category if category in of_each.categories else of_each.category
        limits = of_each.limits(known if known in of_each.categories else None)
        return limits.raw_threshold("image", post_processor.image_sensitivity)
    threshold = float(post_processor.image_threshold)
    if math.isnan(threshold):
        return None
    extent = float(post_processor.image_max - post_processor.image_min)
    if not post_processor.enable_normalization or math.isnan(extent):
        # anomalib compares scores that are not normalized with this, too.
        return 1.0 - post_processor.image_sensitivity
    return threshold + (0.5 - post_processor.image_sensitivity) * extent
