# SPDX-License-Identifier: Apache-2.0
"""The invertible network: Pila, G, the unit, ActNorm, and their composition."""

from anomalib_decad.components.invertible.act_norm import ActNorm
from anomalib_decad.components.invertible.dense_net import DenseLayer, LipschitzDenseNet
from anomalib_decad.components.invertible.fused import FusedNetwork
from anomalib_decad.components.invertible.network import InvertibleNetwork
from anomalib_decad.components.invertible.pila import Pila
from anomalib_decad.components.invertible.solver import fixed_point
from anomalib_decad.components.invertible.unit import MonotoneUnit, SolverIterations

__all__ = [
    "ActNorm",
    "DenseLayer",
    "FusedNetwork",
    "InvertibleNetwork",
    "LipschitzDenseNet",
    "MonotoneUnit",
    "Pila",
    "SolverIterations",
    "fixed_point",
]
