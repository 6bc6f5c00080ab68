# SPDX-License-Identifier: Apache-2.0
"""UniAD with decoupling."""

from anomalib_decad.models.uniad.lightning_model import DecoupledUniAD
from anomalib_decad.models.uniad.torch_model import DecoupledUniADModel

__all__ = ["DecoupledUniAD", "DecoupledUniADModel"]
