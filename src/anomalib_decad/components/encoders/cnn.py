# SPDX-License-Identifier: Apache-2.0
"""Frozen convolutional network whose stages' outputs are reconstructed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from anomalib_decad.components.encoders.base import FrozenEncoder, check_multiple

__all__ = ["CNNEncoder"]


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
        check_multiple(self.name, 2 * max(self.strides), (height, width))

    def create_pretrained(self) -> nn.Module:
        """Create the network with pretrained weights."""
        return self._create(pretrained=True)

    def forward(self, images: torch.Tensor) -> dict[str | int, torch.Tensor]:
        """Encode images.

        Args:
            images (torch.Tensor): Normalized images of shape (B, 3, H, W).

        Returns:
            dict[str | int, torch.Tensor]: For each stage a map of shape (B, channels, H / stride, W / stride).

        Raises:
            EncoderWeightsError: If the weights had to be loaded and could not.
        """
        self.load_weights()
        with torch.no_grad():
            return dict(zip(self.stages, self.cnn(images), strict=True))

    def fuse(self, height: int, width: int) -> None:
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
