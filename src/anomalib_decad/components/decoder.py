# SPDX-License-Identifier: Apache-2.0
"""Decoder that reconstructs the encoder's features from cleaned embeddings, and its errors."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional

from anomalib_decad.ranges import check_range

__all__ = ["FeatureDecoder", "patch_errors"]

# Of the mean eigenvalue: keeps the least squares of the start well posed when there are few patches.
_RIDGE = 1e-3


class FeatureDecoder(nn.Module):
    """Transformer blocks, and for each layer of the encoder a linear map of the embedding and a head on the blocks.

    A feature map is reconstructed as a linear map of the patch's own embedding plus what the blocks, which see its
    surroundings, add to it. As in reverse distillation, early decoder blocks reconstruct deep encoder layers: each head
    reads a block of its own where there are as many as layers, and otherwise the heads are spread evenly.

    Before training (:meth:`initialize`) the linear maps are least squares, and the blocks and heads add nothing.

    Args:
        dim (int): Number of channels of an embedding.
        num_layers (int): Number of feature maps to reconstruct.
        depth (int): Number of transformer blocks. Defaults to ``2``.
        num_heads (int): Attention heads of a block; must divide ``dim``. Defaults to ``6``.

    Raises:
        ValueError: If ``depth`` is below 1.
    """

    def __init__(self, dim: int, num_layers: int, depth: int = 2, num_heads: int = 6) -> None:
        super().__init__()
        check_range(depth >= 1, "decoder_depth", "at least 1", depth)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio=4.0, qkv_bias=True) for _ in range(depth))
        self.heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim)) for _ in range(num_layers))
        self.linears = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_layers))
        # The last layer, the deepest, is read first.
        self.sources = [max(((num_layers - layer) * depth - 1) // num_layers, 0) for layer in range(num_layers)]

    @torch.no_grad()
    def initialize(self, x: torch.Tensor, features: Sequence[torch.Tensor]) -> None:
        """Fit the linear maps to cleaned embeddings and feature maps of normal patches, each of shape (K, dim)."""
        # On the CPU, as not every device has float64.
        x = x.cpu().double()
        centered = x - x.mean(0)
        gram = centered.T @ centered
        gram += _RIDGE * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
        for linear, feature in zip(cast("Iterable[nn.Linear]", self.linears), features, strict=True):
            target = feature.cpu().double()
            mean = target.mean(0)
            weight = torch.linalg.solve(gram, centered.T @ (target - mean)).T
            linear.weight.copy_(weight)
            linear.bias.copy_(mean - weight @ x.mean(0))
        added = [layer for block in cast("Iterable[Block]", self.blocks) for layer in (block.attn.proj, block.mlp.fc2)]
        for layer in (*added, *(head[-1] for head in cast("Iterable[nn.Sequential]", self.heads))):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Reconstruct the map (B, N, dim) of each layer, in the encoder's order, from clean embeddings (B, N, dim)."""
        embedding, outputs = x, []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return [
            linear(embedding) + head(outputs[source])
            for linear, head, source in zip(self.linears, self.heads, self.sources, strict=True)
        ]


def patch_errors(features: Sequence[torch.Tensor], reconstructions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the mean over the layers of 1 - cosine similarity, shape (B, N), from maps of shape (B, N, dim)."""
    errors = [
        1 - functional.cosine_similarity(feature.float(), reconstruction.float(), dim=-1)
        for feature, reconstruction in zip(features, reconstructions, strict=True)
    ]
    return torch.stack(errors).mean(0)
