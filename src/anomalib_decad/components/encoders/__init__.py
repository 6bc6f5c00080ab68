# SPDX-License-Identifier: Apache-2.0
"""Frozen encoders from timm: vision transformers, convolutional networks, and pyramids of either."""

from anomalib_decad.components.encoders.base import EncoderWeightsError, FrozenEncoder, check_name
from anomalib_decad.components.encoders.pyramid import CNNEncoder, ViTPyramid, create_encoder, default_size
from anomalib_decad.components.encoders.vit import ViTEncoder

__all__ = [
    "CNNEncoder",
    "EncoderWeightsError",
    "FrozenEncoder",
    "ViTEncoder",
    "ViTPyramid",
    "check_name",
    "create_encoder",
    "default_size",
]
