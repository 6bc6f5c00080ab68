# SPDX-License-Identifier: Apache-2.0
"""The frozen encoders of the adapters: convolutional networks and vision transformers, as pyramids of feature maps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn
from torch.nn import functional

from anomalib_decad.components import FrozenEncoder, ViTEncoder, check_name

__all__ = ["CNNEncoder", "ViTPyramid", "create_encoder", "default_size"]


class CNNEncoder(FrozenEncoder):
    """Frozen timm convolutional network that returns the outputs of chosen stages.

    Args:
        name (str): Name of a timm network, for example ``"resnet34"``.
        stages (Sequence[int]): Stages whose outputs are returned, counted from 0 at a stride of 2 pixels.
        weights (str | Path | None): Local ``.safetensors`` or ``.pth`` file. Defaults to ``None``: timm's pretrained
            weights, from the Hugging Face hub or its local cache.
        pretrained (bool): Whether to load weights at all; random ones are good for tests only.

    Raises:
        ValueError: If ``name`` is no such network, or has no such stages.
        FileNotFoundError: If ``weights`` is no file.
    """

    def __init__(
        self, name: str, stages: Sequence[int], weights: str | Path | None = None, pretrained: bool = True
    ) -> None:
        super().__init__(name, weights, pretrained)
        self.stages = tuple(stages)
        self.cnn = self._create(pretrained=False)
        self.freeze_parameters()

    @property
    def network(self) -> Any:
        """The convolutional network."""
        return self.cnn

    @property
    def channels(self) -> list[int]:
        """Channels of each feature map."""
        return list(self.cnn.feature_info.channels())

    @property
    def strides(self) -> list[int]:
        """Pixels from one position to the next in each feature map."""
        return list(self.cnn.feature_info.reduction())

    @property
    def finest_stride(self) -> float:
        """Pixels from one position to the next in the finest feature map."""
        return min(self.strides)

    def check(self, height: int, width: int) -> None:
        """Check that the feature maps of an image are each half as large as the one before.

        Args:
            height (int): Image height in pixels.
            width (int): Image width in pixels.

        Raises:
            ValueError: If they are not; the message names a size for which they are.
        """
        _check_multiple(self.name, 2 * max(self.strides), (height, width))

    def pretrained_weights(self) -> Mapping[str, torch.Tensor]:
        """Get timm's pretrained weights, from the hub or its local cache."""
        return self._create(pretrained=True).state_dict()

    def forward(self, images: torch.Tensor) -> dict[str | int, torch.Tensor]:
        """Encode images.

        Args:
            images (torch.Tensor): Normalised images of shape (B, 3, H, W).

        Returns:
            dict[str | int, torch.Tensor]: For each stage a map of shape (B, channels, H / stride, W / stride).

        Raises:
            EncoderWeightsError: If the weights had to be loaded and could not.
        """
        self.load_weights()
        with torch.no_grad():
            return dict(zip(self.stages, self.cnn(images), strict=True))

    def freeze(self, height: int, width: int) -> None:
        """Load the weights; nothing depends on the image size.

        Args:
            height (int): Image height in pixels.
            width (int): Image width in pixels.
        """
        del height, width
        self.load_weights()

    def _create(self, pretrained: bool) -> Any:
        try:
            return timm.create_model(
                self.name, pretrained=pretrained, features_only=True, exportable=True, out_indices=self.stages
            )
        except (IndexError, AssertionError, AttributeError, RuntimeError) as error:
            if pretrained:
                raise
            msg = f"encoder: timm has no network {self.name!r} with the stages {list(self.stages)}: {error}"
            raise ValueError(msg) from error


class ViTPyramid(nn.Module):
    """Frozen vision transformer whose outputs take the place of a convolutional network's feature maps.

    The patch tokens after each block are layer-normalised without weights. For methods that want a pyramid, the maps
    of the first to the last block are resized to twice, once and half the patch grid, and multiplied by fixed random
    matrices with orthonormal rows or columns to the channels that such a network would have.

    Args:
        name (str): Name of a timm vision transformer.
        blocks (Sequence[int]): Blocks whose outputs are returned, counted from 1, in increasing order.
        weights (str | Path | None): Local file with its weights; ``None`` for timm's pretrained weights.
        pretrained (bool): Whether to load weights at all; random ones are good for tests only.
        channels (Sequence[int] | None): Channels of each map of the pyramid. Defaults to ``None``: no pyramid, maps of
            one size and the transformer's own channels.

    Raises:
        ValueError: If ``name`` is no timm vision transformer, or ``blocks`` are not blocks of it, or as many as there
            are ``channels``.
        FileNotFoundError: If ``weights`` is no file.
    """

    def __init__(
        self,
        name: str,
        blocks: Sequence[int],
        weights: str | Path | None = None,
        pretrained: bool = True,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.vit = ViTEncoder(name, blocks, weights, pretrained)
        self.name = name
        self.blocks = tuple(blocks)
        patch = max(self.vit.patch_size)
        self.strides = [patch] * len(self.blocks)
        self.channels = [self.vit.dim] * len(self.blocks)
        self.factors: list[float] = []
        if channels is not None:
            if len(channels) != len(self.blocks):
                msg = f"layers must be {len(channels)} blocks of {name}, got {list(blocks)}"
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
        _check_multiple(self.name, factor * max(self.vit.patch_size), (height, width))

    def load_weights(self) -> None:
        """Load the pretrained weights, unless they or a state dict have been loaded.

        Raises:
            EncoderWeightsError: If they cannot be had.
        """
        self.vit.load_weights()

    def freeze(self, height: int, width: int) -> None:
        """Specialise for one image size, in place, for inference.

        Args:
            height (int): Image height in pixels.
            width (int): Image width in pixels.
        """
        self.vit.freeze(height, width)

    def forward(self, images: torch.Tensor) -> dict[str | int, torch.Tensor]:
        """Encode images.

        Args:
            images (torch.Tensor): Normalised images of shape (B, 3, H, W); H and W are multiples of the patch.

        Returns:
            dict[str | int, torch.Tensor]: For each block a map of shape (B, channels, rows, columns).

        Raises:
            ValueError: If the image size does not fit.
            EncoderWeightsError: If the weights had to be loaded and could not.
        """
        grid = self.vit.grid(*images.shape[-2:])
        maps: dict[str | int, torch.Tensor] = {}
        with torch.no_grad():
            for level, (block, tokens) in enumerate(zip(self.blocks, self.vit(images), strict=True)):
                tokens = functional.layer_norm(tokens, tokens.shape[-1:])
                if self.factors:
                    tokens = tokens @ getattr(self, f"projection{level}").mT.to(tokens.dtype)
                feature = tokens.mT.contiguous().unflatten(2, grid)
                if self.factors and self.factors[level] != 1:
                    size = [round(side * self.factors[level]) for side in grid]
                    feature = functional.interpolate(feature, size=size, mode="bilinear", align_corners=False)
                maps[block] = feature
        return maps


def create_encoder(
    name: str,
    layers: Sequence[int] | None,
    weights: str | Path | None,
    pretrained: bool,
    stages: Sequence[int],
    channels: Sequence[int] | None = None,
) -> CNNEncoder | ViTPyramid:
    """Create the frozen encoder of an adapter.

    Args:
        name (str): Name of a timm convolutional network or vision transformer.
        layers (Sequence[int] | None): Stages of a convolutional network, counted from 0, or blocks of a transformer,
            counted from 1; ``None`` for ``stages``, or the blocks 3, 6 and 9.
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


def _check_multiple(name: str, multiple: int, size: tuple[int, int]) -> None:
    if any(side % multiple for side in size):
        good = [max(round(side / multiple), 1) * multiple for side in size]
        msg = (
            f"with the encoder {name} the image's sides must be multiples of {multiple} pixels, got {size[0]} x "
            f"{size[1]}; {good[0]} x {good[1]} would do"
        )
        raise ValueError(msg)
