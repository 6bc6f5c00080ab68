# SPDX-License-Identifier: Apache-2.0
"""Frozen vision transformer as a pyramid of feature maps, in the place of a convolutional network."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from anomalib_decad.components.encoders.base import check_multiple
from anomalib_decad.components.encoders.vit import ViTEncoder

__all__ = ["ViTPyramid"]


class ViTPyramid(nn.Module):
    """Frozen vision transformer whose outputs take the place of a convolutional network's feature maps.

    The patch tokens after each layer are layer-normalized without weights. For methods that want a pyramid, the maps
    of the first to the last layer are resized to twice, once and half the patch grid, and multiplied by fixed random
    matrices with orthonormal rows or columns to the channels that such a network would have.

    Args:
        name (str): Name of a timm vision transformer.
        layers (Sequence[int]): Layers (transformer blocks) whose outputs are returned, counted from 1, in increasing
            order.
        weights (str | Path | None): Local file with its weights; ``None`` for timm's pretrained weights.
        pretrained (bool): Whether to load weights at all; random ones are good for tests only.
        channels (Sequence[int] | None): Channels of each map of the pyramid. Defaults to ``None``: no pyramid, maps of
            one size and the transformer's own channels.

    Raises:
        ValueError: If ``name`` is no timm vision transformer, or ``layers`` are not layers of it, or as many as there
            are ``channels``.
        FileNotFoundError: If ``weights`` is no file.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[int],
        weights: str | Path | None = None,
        pretrained: bool = True,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.vit = ViTEncoder(name, layers, weights, pretrained)
        self.name = name
        patch = max(self.vit.patch_size)
        self.strides = [patch] * len(layers)
        self.channels = [self.vit.dim] * len(layers)
        self.factors: list[float] = []
        if channels is not None:
            if len(channels) != len(layers):
                msg = f"layers must be {len(channels)} layers of {name}, got {list(layers)}"
                raise ValueError(msg)
            self.channels = list(channels)
            self.factors = [2.0 ** (1 - level) for level in range(len(channels))]
            generator = torch.Generator().manual_seed(0)
            for level, size in enumerate(channels):
                matrix = torch.randn(max(size, self.vit.dim), min(size, self.vit.dim), generator=generator)
                orthonormal = torch.linalg.qr(matrix).Q
                self.register_buffer(f"projection{level}", orthonormal if size >= self.vit.dim else orthonormal.mT)

    @property
    def finest_stride(self) -> float:
        """Pixels from one position to the next in the finest feature map."""
        return max(self.vit.patch_size) / max(self.factors, default=1.0)

    @property
    def image_mean(self) -> tuple[float, ...]:
        """Channel means that the encoder was trained with."""
        return self.vit.image_mean

    @property
    def image_std(self) -> tuple[float, ...]:
        """Channel standard deviations that the encoder was trained with."""
        return self.vit.image_std

    def check(self, height: int, width: int) -> None:
        """Check that an image has whole patches, and that the pyramid's maps are each half as large as the one before.

        Args:
            height (int): Image height in pixels.
            width (int): Image width in pixels.

        Raises:
            ValueError: If not; the message names a size that fits.
        """
        factor = 4 if self.factors else 1
        check_multiple(self.name, factor * max(self.vit.patch_size), (height, width))

    def load_weights(self) -> None:
        """Load the pretrained weights, unless they or a state dict have been loaded.

        Raises:
            EncoderWeightsError: If they cannot be had.
        """
        self.vit.load_weights()

    def fuse(self, height: int, width: int) -> None:
        """Specialize for one image size, in place, for inference.

        Args:
            height (int): Image height in pixels.
            width (int): Image width in pixels.
        """
        self.vit.fuse(height, width)

    def forward(self, images: torch.Tensor) -> dict[str | int, torch.Tensor]:
        """Encode images.

        Args:
            images (torch.Tensor): Normalized images of shape (B, 3, H, W); H and W are multiples of the patch.

        Returns:
            dict[str | int, torch.Tensor]: For each layer a map of shape (B, channels, rows, columns).

        Raises:
            ValueError: If the image size does not fit.
            EncoderWeightsError: If the weights had to be loaded and could not.
        """
        grid = self.vit.grid(*images.shape[-2:])
        maps: dict[str | int, torch.Tensor] = {}
        with torch.no_grad():
            for level, (layer, tokens) in enumerate(zip(self.vit.layers, self.vit(images), strict=True)):
                tokens = functional.layer_norm(tokens, tokens.shape[-1:])
                if self.factors:
                    tokens = tokens @ getattr(self, f"projection{level}").mT.to(tokens.dtype)
                feature = tokens.mT.contiguous().unflatten(2, grid)
                if self.factors and self.factors[level] != 1:
                    size = [round(side * self.factors[level]) for side in grid]
                    feature = functional.interpolate(feature, size=size, mode="bilinear", align_corners=False)
                maps[layer] = feature
        return maps
