# SPDX-License-Identifier: Apache-2.0
"""The decoder that reconstructs the encoder's features from cleaned embeddings."""

import torch
from timm.models.vision_transformer import Block
from torch import nn

__all__ = ["FeatureDecoder"]


class FeatureDecoder(nn.Module):
    """Transformer blocks with an output head for each tapped encoder block.

    As in reverse distillation the order is reversed: early decoder blocks reconstruct deep encoder blocks. With as
    many decoder blocks as taps each head reads a block of its own; otherwise the heads are spread evenly.

    Args:
        dim (int): Number of channels of an embedding.
        num_taps (int): Number of feature maps to reconstruct.
        depth (int): Number of transformer blocks.
            Defaults to ``3``.
        num_heads (int): Attention heads of a block; must divide ``dim``.
            Defaults to ``6``.

    Raises:
        ValueError: If ``depth`` is below 1.
    """

    def __init__(self, dim: int, num_taps: int, depth: int = 3, num_heads: int = 6) -> None:
        super().__init__()
        if depth < 1:
            msg = f"decoder_depth must be at least 1, got {depth}"
            raise ValueError(msg)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio=4.0, qkv_bias=True) for _ in range(depth))
        self.heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim)) for _ in range(num_taps))
        # The last tap, the deepest, is read first.
        self.sources = [((num_taps - tap) * depth - 1) // num_taps for tap in range(num_taps)]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Reconstruct the feature maps.

        Args:
            x (torch.Tensor): Cleaned embeddings of shape (B, N, dim).

        Returns:
            list[torch.Tensor]: A reconstruction of shape (B, N, dim) for each tap, in the encoder's order.
        """
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return [head(outputs[max(source, 0)]) for head, source in zip(self.heads, self.sources, strict=True)]
