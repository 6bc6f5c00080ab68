# SPDX-License-Identifier: Apache-2.0
"""Choice of an encoder by its name in timm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import timm
import torch

from anomalib_decad.components.encoders.base import check_name
from anomalib_decad.components.encoders.cnn import CNNEncoder
from anomalib_decad.components.encoders.pyramid import ViTPyramid
from anomalib_decad.components.encoders.vit import ViTEncoder

__all__ = ["create_encoder", "default_size"]


def create_encoder(
    name: str,
    layers: Sequence[int] | None,
    weights: str | Path | None,
    pretrained: bool,
    stages: Sequence[int],
    channels: Sequence[int] | None = None,
) -> CNNEncoder | ViTPyramid:
    """Create a frozen encoder that gives a pyramid of feature maps.

    Args:
        name (str): Name of a timm convolutional network or vision transformer.
        layers (Sequence[int] | None): Stages of a convolutional network, counted from 0, or layers (blocks) of a
            transformer, counted from 1; ``None`` for ``stages``, or the layers 3, 6 and 9.
        weights (str | Path | None): Local file with its weights; ``None`` for timm's pretrained weights.
        pretrained (bool): Whether to load weights at all.
        stages (Sequence[int]): The method's stages of a convolutional network.
        channels (Sequence[int] | None): Channels of the pyramid that a transformer's outputs become; ``None`` for no
            pyramid.

    Returns:
        CNNEncoder | ViTPyramid: The encoder.

    Raises:
        ValueError: If timm has no such network, or it has no such layers.
        FileNotFoundError: If ``weights`` is no file.
    """
    if _kind(name) == "transformer":
        return ViTPyramid(name, layers or (3, 6, 9), weights, pretrained, channels)
    return CNNEncoder(name, layers or stages, weights, pretrained)


def default_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """Choose an image size: 20 x 20 patches of a transformer, and a given one for other networks.

    Args:
        name (str): Name of the encoder.
        size (tuple[int, int]): Height and width for a convolutional network, in pixels.

    Returns:
        tuple[int, int]: Height and width in pixels.
    """
    if _kind(name) == "convolutional":
        return size
    with torch.device("meta"):  # no weights are made
        height, width = ViTEncoder(name, [1], pretrained=False).patch_size
    return 20 * height, 20 * width


def _kind(name: str) -> Literal["transformer", "convolutional"]:
    architecture = check_name(name)
    module = timm.model_entrypoint(architecture).__module__
    transformers = ("vision_transformer", "deit", "eva", "beit")
    return "transformer" if module.rpartition(".")[2] in transformers else "convolutional"
