# SPDX-License-Identifier: Apache-2.0
"""The parts that models are composed of. They know nothing of Lightning and of any model."""

from anomalib_decad.components.decoder import FeatureDecoder
from anomalib_decad.components.decoupler import Decoupler, DecouplingLoss
from anomalib_decad.components.embedding_decoupling import EmbeddingDecoupling, attach
from anomalib_decad.components.encoders import EncoderWeightsError, FrozenEncoder, ViTEncoder, create_encoder
from anomalib_decad.components.invertible import InvertibleNetwork
from anomalib_decad.components.options import (
    DecouplerOptions,
    DecouplingLossOptions,
    InvertibleOptions,
    SynthesisOptions,
)
from anomalib_decad.components.patch_sampling import PatchSample, choose_patches, sample_patches
from anomalib_decad.components.prior import PrototypePrior, Prototypes
from anomalib_decad.components.recognition import CategoryPrediction, CategoryRecognizer
from anomalib_decad.components.synthesis import AdversarialSynthesis
from anomalib_decad.components.whitening import FeatureFusion, FeatureStandardizer

__all__ = [
    "AdversarialSynthesis",
    "CategoryPrediction",
    "CategoryRecognizer",
    "Decoupler",
    "DecouplerOptions",
    "DecouplingLoss",
    "DecouplingLossOptions",
    "EmbeddingDecoupling",
    "EncoderWeightsError",
    "FeatureDecoder",
    "FeatureFusion",
    "FeatureStandardizer",
    "FrozenEncoder",
    "InvertibleNetwork",
    "InvertibleOptions",
    "PatchSample",
    "PrototypePrior",
    "Prototypes",
    "SynthesisOptions",
    "ViTEncoder",
    "attach",
    "choose_patches",
    "create_encoder",
    "sample_patches",
]
