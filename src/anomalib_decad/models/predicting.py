# SPDX-License-Identifier: Apache-2.0
"""How the package's models predict: in a validation, a test, a prediction and an export."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.models.components import AnomalibModule
from lightning.pytorch.utilities.types import STEP_OUTPUT

from anomalib_decad.metrics import lacks_threshold

__all__ = ["PredictingMixin"]

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = AnomalibModule
else:
    _Base = object


class PredictingMixin(_Base):
    """The steps in which a model predicts, and recognizes the product of each image.

    ``AnomalibModule`` comes behind it in the order of bases. The torch module ``model`` gives a
    :class:`CategoryPrediction` in eval mode.
    """

    model: Any

    def on_test_start(self) -> None:
        """Say so where labels mean nothing."""
        self._warn_without_threshold()

    def on_predict_start(self) -> None:
        """Say so where labels mean nothing."""
        self._warn_without_threshold()

    def _warn_without_threshold(self) -> None:
        if lacks_threshold(self.post_processor):
            logger.warning(
                "The model was never validated, so it has no thresholds: scores and maps are as they are, and labels "
                "and masks mean nothing. Use a checkpoint that was saved after a validation "
                "(--trainer.val_check_interval says when these are)."
            )

    def forward(self, batch: torch.Tensor, *args: Any, **kwargs: Any) -> InferenceBatch:
        """Predict images, as an export does.

        Args:
            batch (torch.Tensor): Images of shape (B, 3, H, W), of any size, in [0, 1].
            *args (Any): Unused.
            **kwargs (Any): Unused.

        Returns:
            InferenceBatch: Scores, maps, labels and masks. Without a post-processor, raw scores and maps.

        Raises:
            RuntimeError: If the model is in training mode.
        """
        del args, kwargs
        if self.training:
            msg = "the model is in training mode, in which it does not predict: call model.eval() before"
            raise RuntimeError(msg)
        prediction = self.model(self.pre_processor(batch) if self.pre_processor else batch)
        if self.post_processor:
            return self.post_processor(prediction)
        return InferenceBatch(pred_score=prediction.pred_score, anomaly_map=prediction.anomaly_map)

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
        return self._predict(batch)

    def test_step(self, batch: Batch, batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Predict a batch, for the metrics.

        Args:
            batch (Batch): Batch with images of shape (B, 3, H, W).
            batch_idx (int): Unused.
            *args (Any): Unused.
            **kwargs (Any): Unused.

        Returns:
            STEP_OUTPUT: The batch with ``pred_score`` and ``anomaly_map``.
        """
        del batch_idx, args, kwargs
        return self._predict(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Predict a batch.

        Args:
            batch (Batch): Batch with images of shape (B, 3, H, W).
            batch_idx (int): Unused.
            dataloader_idx (int): Unused.

        Returns:
            STEP_OUTPUT: The batch with ``pred_score`` and ``anomaly_map``.
        """
        del batch_idx, dataloader_idx
        return self._predict(batch)

    def _predict(self, batch: Batch) -> Any:
        prediction = self.model(batch.image)
        # Which product it is like. The category of a batch, if it has one, is what the data says.
        batch.category_index = prediction.category  # type: ignore[attr-defined]
        return batch.update(pred_score=prediction.pred_score, anomaly_map=prediction.anomaly_map)
