# SPDX-License-Identifier: Apache-2.0
"""MambaAD with decoupling."""

from anomalib_decad.models.mambaad.lightning_model import DecoupledMambaAD
from anomalib_decad.models.mambaad.torch_model import DecoupledMambaADModel

__all__ = ["DecoupledMambaAD", "DecoupledMambaADModel"]
