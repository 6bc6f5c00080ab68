# SPDX-License-Identifier: Apache-2.0
"""Frozen vision transformer whose layers' outputs are reconstructed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import LayerScale
from torch import nn

from anomalib_decad.compat import antialiased_position_embeddings
from anomalib_decad.components.encoders.base import FrozenEncoder, check_name

__all__ = ["ViTEncoder"]


class ViTEncoder(FrozenEncoder):
    """Frozen timm vision transformer that returns the patch tokens after chosen layers.

    Layers are transformer blocks, counted from 1. Nothing behind the last chosen one is kept or computed.
    Images of any size whose sides are multiples of the patch are taken; position embeddings are resampled to it.

    Args:
        name (str): Name of a timm vision transformer, for example ``"vit_base_patch14_dinov2"``.
        layers (Sequence[int]): Layers whose outputs are returned, counted from 1, in increasing order.
        weights (str | Path | None): Local ``.safetensors`` or ``.pth`` file in timm's or the original DINOv2's key
            names. Defaults to ``None``: timm's pretrained weights, from the Hugging Face hub or its local cache.
        pretrained (bool): Whether to load weights at all; random ones are good for tests only.

    Raises:
        ValueError: If ``name`` is no timm vision transformer, or ``layers`` are not layers of it.
        FileNotFoundError: If ``weights`` is no file.
    """

    vit: Any

    def __init__(
        self,
        name: str,
        layers: Sequence[int],
        weights: str | Path | None = None,
        pretrained: bool = True,
    ) -> None:
        super().__init__(name, weights, pretrained)
        self.vit = _create_vit(name)
        depth = len(self.vit.blocks)
        if (
            not layers
            or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers)
            or sorted(set(layers)) != list(layers)
            or not (layers[0] >= 1 and layers[-1] <= depth)
        ):
            msg = f"layers must be increasing numbers from 1 to {depth}, the depth of {name}; got {list(layers)}"
            raise ValueError(msg)
        self.layers = tuple(layers)
        self._indices = [layer - 1 for layer in layers]
        self.vit.prune_intermediate_layers(self._indices, prune_norm=True, prune_head=True)
        self.freeze_parameters()

    @property
    def network(self) -> Any:
        """The transformer."""
        return self.vit

    @property
    def dim(self) -> int:
        """Number of channels of a patch token."""
        return self.vit.embed_dim

    @property
    def num_heads(self) -> int:
        """Number of attention heads of a block."""
        return self.vit.blocks[0].attn.num_heads

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        height, width = self.vit.patch_embed.patch_size
        return height, width

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Compute the number of patches in an image.

        Args:
            height (int): Image height in pixels.
            width (int): Image width in pixels.

        Returns:
            tuple[int, int]: Number of patch rows and columns.

        Raises:
            ValueError: If a side is no multiple of the patch; the message names a size that is.
        """
        patch_height, patch_width = self.patch_size
        if height % patch_height or width % patch_width:
            good = [max(round(s / p), 1) * p for s, p in ((height, patch_height), (width, patch_width))]
            msg = (
                f"the encoder {self.name} takes images whose sides are multiples of its patch of "
                f"{patch_height} x {patch_width} pixels, got {height} x {width}; {good[0]} x {good[1]} would do"
            )
            raise ValueError(msg)
        return height // patch_height, width // patch_width

    def create_pretrained(self) -> nn.Module:
        """Create the transformer with pretrained weights."""
        return timm.create_model(self.name, pretrained=True, num_classes=0)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Encode images.

        Args:
            images (torch.Tensor): Normalized images of shape (B, 3, H, W); H and W are multiples of the patch.

        Returns:
            list[torch.Tensor]: Patch tokens of shape (B, N, dim), N patches row by row, for each of the layers.

        Raises:
            ValueError: If the image size does not fit.
            EncoderWeightsError: If the weights had to be loaded and could not.
        """
        self.grid(*images.shape[-2:])
        self.load_weights()
        with torch.no_grad(), antialiased_position_embeddings(self.vit):
            return self.vit.forward_intermediates(
                images, indices=self._indices, norm=False, output_fmt="NLC", intermediates_only=True
            )

    @torch.no_grad()
    def fuse(self, height: int, width: int) -> None:
        """Specialize for one image size, in place, for inference: other sizes are no longer taken.

        The position embeddings are resampled once instead of in each forward pass, and the scales behind attention
        and MLP are multiplied into the weights in front of them. The outputs are the same within rounding.

        Args:
            height (int): Image height in pixels, a multiple of the patch.
            width (int): Image width in pixels.

        Raises:
            ValueError: If the image size does not fit.
        """
        self.grid(height, width)
        self.load_weights()
        vit = _create_vit(self.name, dynamic_img_size=False)
        if not hasattr(vit, "set_input_size"):
            return  # an architecture without position embeddings to resample
        vit.prune_intermediate_layers(self._indices, prune_norm=True, prune_head=True)
        vit.load_state_dict(self.vit.state_dict())
        with antialiased_position_embeddings(self.vit):
            vit.set_input_size((height, width))
        for block in vit.blocks:
            _fuse_layer_scale(block)
        self.vit = vit.requires_grad_(False).eval().to(next(self.vit.parameters()).device)


def _create_vit(name: str, dynamic_img_size: bool = True) -> Any:  # timm's transformers share an interface, but no type
    """Create a timm vision transformer with random weights."""
    check_name(name, ["vit_*", "deit*", "eva*", "beit*"])
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=dynamic_img_size)
    except TypeError:  # an architecture without image sizes to choose
        model = None
    if not all(hasattr(model, part) for part in ("blocks", "patch_embed", "forward_intermediates")):
        msg = f"encoder: {name!r} is no vision transformer that gives the outputs of its layers"
        raise ValueError(msg)
    return model


def _fuse_layer_scale(block: nn.Module) -> None:
    """Multiply the scales of a timm transformer block into the linear maps in front of them."""
    for name, path in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
        scale = getattr(block, name, None)
        try:
            linear = block.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(scale, LayerScale) and isinstance(linear, nn.Linear):
            linear.weight.mul_(scale.gamma[:, None])
            if linear.bias is not None:
                linear.bias.mul_(scale.gamma)
            setattr(block, name, nn.Identity())
