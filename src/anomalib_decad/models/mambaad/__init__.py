# SPDX-License-Identifier: Apache-2.0
"""MambaAD with decoupling."""

from anomalib_decad.models.mambaad.lightning_model import DecoupledMambaAD

__all__ = ["DecoupledMambaAD"]
