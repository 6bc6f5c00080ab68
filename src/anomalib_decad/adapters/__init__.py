# SPDX-License-Identifier: Apache-2.0
"""The decoupler inside other methods: reverse distillation, UniAD, MambaAD, and anyone's model."""

from anomalib_decad.adapters.decoupling import EmbeddingDecoupling, attach
from anomalib_decad.adapters.mambaad import DecoupledMambaAD, DecoupledMambaADModel
from anomalib_decad.adapters.module import DecoupledModule
from anomalib_decad.adapters.reverse_distillation import (
    DecoupledReverseDistillation,
    DecoupledReverseDistillationModel,
)
from anomalib_decad.adapters.torch_model import DecoupledModel
from anomalib_decad.adapters.uniad import DecoupledUniAD, DecoupledUniADModel

__all__ = [
    "DecoupledMambaAD",
    "DecoupledMambaADModel",
    "DecoupledModel",
    "DecoupledModule",
    "DecoupledReverseDistillation",
    "DecoupledReverseDistillationModel",
    "DecoupledUniAD",
    "DecoupledUniADModel",
    "EmbeddingDecoupling",
    "attach",
]
