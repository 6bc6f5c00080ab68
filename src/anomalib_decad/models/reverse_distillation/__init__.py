# SPDX-License-Identifier: Apache-2.0
"""Reverse distillation with decoupling."""

from anomalib_decad.models.reverse_distillation.lightning_model import DecoupledReverseDistillation

__all__ = ["DecoupledReverseDistillation"]
