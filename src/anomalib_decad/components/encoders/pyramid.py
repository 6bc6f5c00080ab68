# SPDX-License-Identifier: Apache-2.0
"""Frozen encoders that give pyramids of feature maps: convolutional networks, and transformers in their place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional

from anomalib_decad.components.encoders.vit import FrozenEncoder, ViTEncoder, check_multiple, check_name

__all__ = ["CNNEncoder", "ViTPyramid", "create_encoder"]

_TRANSFORMERS = ("vision_transformer", "deit", "eva", "beit")


class CNNEncoder(FrozenEncoder):
    """Frozen timm convolutional network that returns the outputs of chosen stages.

    The other arguments are those of :class:`FrozenEncoder`, and so are the errors.

    Args:
        stages (Sequence[int]): Stages whose outputs are returned, counted from 0 at a stride of 2 pixels.

    Raises:
        ValueError: If ``name`` is no such network, or has no such stages.
    """

    def __init__(
        self, name: str, stages: Sequence[int], weights: str | Path | None = None, pretrained: bool = True
    ) -> None:
        super().__init__(name, weights, pretrained)
        self.stages = tuple(stages)
        try:
            self.cnn = self._create(pretrained=False)
        except (IndexError, AssertionError, AttributeError, RuntimeError) as error:
            msg = f"encoder: timm has no network {name!r} with the stages {list(stages)}: {error}"
            raise ValueError(msg) from error
        self.channels: list[int] = list(self.cnn.feature_info.channels())
        #: Pixels from one position to the next in each feature map.
        self.strides: list[int] = list(self.cnn.feature_info.reduction())
        self.finest_stride: float = min(self.strides)
        self.freeze_parameters()

    def check(self, height: int, width: int) -> None:
        """Check that each map of an image, in pixels, has half the size of the last; a ValueError names a good size."""
        multiple = 2 * max(self.strides)
        check_multiple(self.name, (height, width), (multiple, multiple), str(multiple))

    def create_pretrained(self) -> nn.Module:
        """Create the network with timm's pretrained weights."""
        return self._create(pretrained=True)

    def forward(self, images: torch.Tensor) -> dict[str | int, torch.Tensor]:
        """Encode normalized images (B, 3, H, W): for each stage a map (B, channels, H / stride, W / stride).

        Raises:
            EncoderWeightsError: If the weights cannot be loaded.
        """
        self.load_weights()
        with torch.no_grad():
            return dict(zip(self.stages, self.cnn(images), strict=True))

    def fuse(self, height: int, width: int) -> None:
        """Load the weights: nothing depends on the image size."""
        del height, width
        self.load_weights()

    def _create(self, pretrained: bool) -> Any:
        return timm.create_model(
            self.name, pretrained=pretrained, features_only=True, exportable=True, out_indices=self.stages
        )


class ViTPyramid(ViTEncoder):
    """Frozen vision transformer whose outputs take the place of a convolutional network's feature maps.

    The patch tokens after each layer are layer-normalized without weights. For methods that want a pyramid, the maps
    of the first to the last layer are resized to twice, once and half the patch grid, and multiplied by fixed random
    matrices with orthonormal rows or columns to the channels that such a network would have.

    The other arguments are those of :class:`ViTEncoder`, and so are the errors.

    Args:
        channels (Sequence[int] | None): Channels of each map of the pyramid, as many as ``layers``, else a ValueError.
            Defaults to ``None``: no pyramid, maps of one size and the transformer's own channels.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[int],
        weights: str | Path | None = None,
        pretrained: bool = True,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__(name, layers, weights, pretrained)
        if channels is not None and len(channels) != len(layers):
            msg = f"layers must be {len(channels)} layers of {name}, got {list(layers)}"
            raise ValueError(msg)
        self.channels = list(channels or [self.dim] * len(layers))
        #: Rows of each map over those of the patch grid; empty without a pyramid.
        self.factors = [2.0 ** (1 - level) for level in range(len(channels or ()))]
        patch = max(self.patch_size)
        self.strides = [patch] * len(layers)
        self.finest_stride = patch / max(self.factors, default=1.0)
        generator = torch.Generator().manual_seed(0)
        for level, size in enumerate(channels or ()):
            shape = max(size, self.dim), min(size, self.dim)
            orthonormal = torch.linalg.qr(torch.randn(shape, generator=generator)).Q
            self.register_buffer(f"projection{level}", orthonormal if size >= self.dim else orthonormal.mT)

    def check(self, height: int, width: int) -> None:
        """Check that an image size in pixels has whole patches in each map; a ValueError names a good size."""
        multiple = (4 if self.factors else 1) * max(self.patch_size)
        check_multiple(self.name, (height, width), (multiple, multiple), str(multiple))

    def forward(self, images: torch.Tensor) -> dict[str | int, torch.Tensor]:  # type: ignore[override]
        """Encode normalized images (B, 3, H, W): for each layer a map; errors as in :meth:`ViTEncoder.forward`."""
        grid = self.grid(*images.shape[-2:])
        maps: dict[str | int, torch.Tensor] = {}
        with torch.no_grad():
            for level, (layer, tokens) in enumerate(zip(self.layers, super().forward(images), strict=True)):
                tokens = functional.layer_norm(tokens, tokens.shape[-1:])
                if self.factors:
                    tokens = tokens @ getattr(self, f"projection{level}").mT.to(tokens.dtype)
                feature = tokens.mT.contiguous().unflatten(2, grid)
                if self.factors and self.factors[level] != 1:
                    size = [round(side * self.factors[level]) for side in grid]
                    feature = functional.interpolate(feature, size=size, mode="bilinear", align_corners=False)
                maps[layer] = feature
        return maps


def create_encoder(
    name: str,
    layers: Sequence[int] | None,
    weights: str | Path | None,
    stages: Sequence[int],
    channels: Sequence[int] | None = None,
) -> CNNEncoder | ViTPyramid:
    """Create a frozen encoder that gives a pyramid of feature maps.

    Args:
        name (str): Name of a timm convolutional network or vision transformer.
        layers (Sequence[int] | None): Stages of the one, counted from 0, or layers of the other, counted from 1;
            ``None`` for ``stages``, or the layers 3, 6 and 9.
        weights (str | Path | None): See :class:`FrozenEncoder`.
        stages (Sequence[int]): The method's stages of a convolutional network.
        channels (Sequence[int] | None): See :class:`ViTPyramid`. Defaults to ``None``: no pyramid.

    Returns:
        CNNEncoder | ViTPyramid: The encoder, whose errors are raised.
    """
    if timm.model_entrypoint(check_name(name)).__module__.rpartition(".")[2] in _TRANSFORMERS:
        return ViTPyramid(name, layers or (3, 6, 9), weights, channels=channels)
    return CNNEncoder(name, layers or stages, weights)
