# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind beside the model; all but :class:`LastCheckpoint` work with every anomalib model."""

from anomalib_decad.callbacks.anomaly_maps import AnomalyMapWriter
from anomalib_decad.callbacks.base import PredictionCallback
from anomalib_decad.callbacks.last_checkpoint import LastCheckpoint
from anomalib_decad.callbacks.prediction_table import PredictionTable
from anomalib_decad.callbacks.report import Report

__all__ = ["AnomalyMapWriter", "LastCheckpoint", "PredictionCallback", "PredictionTable", "Report"]
