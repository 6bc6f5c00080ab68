# SPDX-License-Identifier: Apache-2.0
"""DecAD: detection by decoupling, in one model for all products."""

from anomalib_decad.models.decad.anomaly_map import AnomalyMapGenerator, AnomalyMapOptions
from anomalib_decad.models.decad.lightning_model import DecAD
from anomalib_decad.models.decad.loss import DecADLoss
from anomalib_decad.models.decad.torch_model import DecADModel

__all__ = ["AnomalyMapGenerator", "AnomalyMapOptions", "DecAD", "DecADLoss", "DecADModel"]
