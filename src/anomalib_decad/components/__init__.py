# SPDX-License-Identifier: Apache-2.0
"""The parts of DecAD. They know nothing of Lightning."""

from anomalib_decad.components.decoder import FeatureDecoder
from anomalib_decad.components.decoupler import Decoupler
from anomalib_decad.components.encoder import EncoderWeightsError, FrozenEncoder, ViTEncoder, check_name
from anomalib_decad.components.fusion import FeatureFusion, FeatureStandardiser
from anomalib_decad.components.invertible import InvertibleNetwork, LipschitzDenseNet, MonotoneUnit, Pila
from anomalib_decad.components.memory import PrototypeMemory
from anomalib_decad.components.prior import ConditionalPrior
from anomalib_decad.components.solver import fixed_point
from anomalib_decad.components.synthesis import AdversarialSynthesis

__all__ = [
    "AdversarialSynthesis",
    "ConditionalPrior",
    "Decoupler",
    "EncoderWeightsError",
    "FeatureDecoder",
    "FeatureFusion",
    "FeatureStandardiser",
    "FrozenEncoder",
    "InvertibleNetwork",
    "LipschitzDenseNet",
    "MonotoneUnit",
    "Pila",
    "PrototypeMemory",
    "ViTEncoder",
    "check_name",
    "fixed_point",
]
