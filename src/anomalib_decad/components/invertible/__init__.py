# SPDX-License-Identifier: Apache-2.0
"""The invertible network, and the equation of a chain of its units."""

from anomalib_decad.components.invertible.network import FrozenNetwork, InvertibleNetwork, NetworkWeights

__all__ = ["FrozenNetwork", "InvertibleNetwork", "NetworkWeights"]
