# SPDX-License-Identifier: Apache-2.0
"""Frozen encoders from timm: vision transformers, convolutional networks, and pyramids of either."""

from anomalib_decad.components.encoders.pyramid import CNNEncoder, ViTPyramid, create_encoder
from anomalib_decad.components.encoders.vit import EncoderWeightsError, FrozenEncoder, ViTEncoder, check_name

__all__ = [
    "CNNEncoder", "EncoderWeightsError", "FrozenEncoder", "ViTEncoder", "ViTPyramid", "check_name", "create_encoder",
]  # fmt: skip
