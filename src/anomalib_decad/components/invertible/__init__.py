# SPDX-License-Identifier: Apache-2.0
"""The invertible network: Pila, the equation that its units are folded into, its solver, and the network."""

from anomalib_decad.components.invertible.network import FrozenNetwork, InvertibleNetwork, NetworkWeights
from anomalib_decad.components.invertible.pila import Pila

__all__ = ["FrozenNetwork", "InvertibleNetwork", "NetworkWeights", "Pila"]
