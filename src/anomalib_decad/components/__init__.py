# SPDX-License-Identifier: Apache-2.0
"""The parts of DecAD. They know nothing of Lightning or anomalib."""

from anomalib_decad.components.decoder import FeatureDecoder
from anomalib_decad.components.decoupler import Decoupler
from anomalib_decad.components.encoder import EncoderWeightsError, ViTEncoder
from anomalib_decad.components.fusion import FeatureStandardiser, fuse
from anomalib_decad.components.invertible import InvertibleNetwork, LipschitzDenseNet, MonotoneUnit, Pila
from anomalib_decad.components.solver import fixed_point
from anomalib_decad.components.synthesis import AdversarialSynthesis

__all__ = [
    "AdversarialSynthesis",
    "Decoupler",
    "EncoderWeightsError",
    "FeatureDecoder",
    "FeatureStandardiser",
    "InvertibleNetwork",
    "LipschitzDenseNet",
    "MonotoneUnit",
    "Pila",
    "ViTEncoder",
    "fixed_point",
    "fuse",
]
