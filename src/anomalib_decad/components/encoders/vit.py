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
from anomalib_decad.components.encoders.base import FrozenEncoder, check_multiple, check_name

__all__ = ["ViTEncoder"]


class ViTEncoder(FrozenEncoder):
    """Frozen timm vision transformer that returns the patch tokens after chosen layers.

    Layers are transformer blocks, counted from 1; those after the last chosen one are removed. The position embeddings
    are resampled to any image size that is a multiple of the patch.

    Args:
        name (str): Name of a timm vision transformer, for example ``"vit_base_patch14_dinov2"``.
        layers (Sequence[int]): Layers whose outputs are returned, in increasing order.
        weights (str | Path | None): See :class:`FrozenEncoder`. Defaults to ``None``.
        pretrained (bool): See :class:`FrozenEncoder`. Defaults to ``True``.

    Raises:
        ValueError: If ``name`` is no timm vision transformer, or ``layers`` are not layers of it.
        FileNotFoundError: If ``weights`` is no file.
    """

    vit: Any

    def __init__(
        self, name: str, layers: Sequence[int], weights: str | Path | None = None, pretrained: bool = True
    ) -> None:
        super().__init__(name, weights, pretrained)
        self.vit = _create_vit(name)
        depth = len(self.vit.blocks)
        are_numbers = all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers)
        if not (
            layers and are_numbers and sorted(set(layers)) == list(layers) and 1 <= layers[0] <= layers[-1] <= depth
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
        """Give the patch rows and columns of an image size in pixels; a ValueError names a size that fits."""
        patch = self.patch_size
        check_multiple(self.name, (height, width), patch, f"its patch of {patch[0]} x {patch[1]}")
        return height // patch[0], width // patch[1]

    def create_pretrained(self) -> nn.Module:
        """Create the transformer with timm's pretrained weights."""
        return timm.create_model(self.name, pretrained=True, num_classes=0)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Encode normalized images (B, 3, H, W): the patch tokens (B, N, dim) of each layer, row by row.

        Raises:
            ValueError: If H or W is no multiple of the patch.
            EncoderWeightsError: If the weights cannot be loaded.
        """
        self.grid(*images.shape[-2:])
        self.load_weights()
        with torch.no_grad(), antialiased_position_embeddings(self.vit):
            return self.vit.forward_intermediates(
                images, indices=self._indices, norm=False, output_fmt="NLC", intermediates_only=True
            )

    @torch.no_grad()
    def fuse(self, height: int, width: int) -> None:
        """Specialize for one image size in pixels, in place, for inference; a ValueError names a size that fits.

        The position embeddings are resampled once, and the scales after attention and MLP are multiplied into the
        weights before them. The outputs are the same within rounding; other sizes are no longer taken.
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


def _create_vit(name: str, dynamic_img_size: bool = True) -> Any:
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
    """Multiply the layer scales of a timm transformer block into the linear maps before them."""
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
