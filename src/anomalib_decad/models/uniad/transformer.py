# SPDX-License-Identifier: Apache-2.0
"""UniAD's transformer: neighbor-masked attention and a decoder with a learned query in each layer."""

import torch
from torch import nn
from torch.nn import functional

from anomalib_decad.ranges import check_range

__all__ = ["PositionEmbedding", "QueryDecoder", "TransformerEncoder", "neighbor_mask"]

_MLP_RATIO = 4
_DROPOUT = 0.1


def neighbor_mask(grid: tuple[int, int], neighbors: int) -> torch.Tensor:
    """Mark the positions that a position must not attend to: the square around it (UniAD, section 3.2).

    Args:
        grid (tuple[int, int]): Rows and columns.
        neighbors (int): Side of the square in positions; odd. 1 masks the position itself.

    Returns:
        torch.Tensor: Booleans of shape (N, N), N = rows * columns; true where attention is masked.

    Raises:
        ValueError: If ``neighbors`` is not odd and positive, or leaves a position nothing to attend to.
    """
    check_range(neighbors >= 1 and neighbors % 2 == 1, "neighbors", "an odd positive number", neighbors)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    positions = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    mask = (positions[:, None] - positions).abs().amax(-1) <= neighbors // 2
    if mask.all(1).any():
        msg = f"neighbors: {neighbors} masks all of a feature map of {grid[0]} x {grid[1]}; use larger images"
        raise ValueError(msg)
    return mask


class PositionEmbedding(nn.Module):
    """Learned embedding of a grid's (rows, columns): half of ``dim`` channels for the row, half for the column."""

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.rand(grid[0], 1, dim // 2))
        self.columns = nn.Parameter(torch.rand(1, grid[1], dim // 2))

    def forward(self) -> torch.Tensor:
        """Compute the embeddings, shape (N, dim), N = rows * columns."""
        grid = (self.rows.shape[0], self.columns.shape[1], -1)
        return torch.cat([self.rows.expand(grid), self.columns.expand(grid)], dim=-1).flatten(0, 1)


class _Attention(nn.Module):
    """Attention, then a residual and a layer norm; positions enter queries and keys, not values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, num_heads, dropout=_DROPOUT, batch_first=True)
        self.dropout = nn.Dropout(_DROPOUT)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, query: torch.Tensor, memory: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        attended, _ = self.attention(query + positions, memory + positions, memory, attn_mask=mask, need_weights=False)
        return self.norm(query + self.dropout(attended))


class _MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, _MLP_RATIO * dim)
        self.reduce = nn.Linear(_MLP_RATIO * dim, dim)
        self.dropout = nn.Dropout(_DROPOUT)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(functional.relu(self.expand(x)))
        return self.norm(x + self.dropout(self.reduce(hidden)))


class _EncoderLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = _Attention(dim, num_heads)
        self.mlp = _MLP(dim)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.attention(x, x, positions, mask))


class _DecoderLayer(nn.Module):
    """Layer whose query is learned, and so cannot carry the input past the attention."""

    def __init__(self, num_positions: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, num_positions, dim))
        self.memory_attention = _Attention(dim, num_heads)
        self.output_attention = _Attention(dim, num_heads)
        self.mlp = _MLP(dim)

    def forward(
        self, output: torch.Tensor, memory: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        query = self.query.expand(memory.shape[0], -1, -1)
        query = self.memory_attention(query, memory, positions, mask)
        return self.mlp(self.output_attention(query, output, positions, mask))


class _MaskedStack(nn.Module):
    mask: torch.Tensor

    def __init__(self, grid: tuple[int, int], neighbors: int) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("mask", neighbor_mask(grid, neighbors), persistent=False)


class TransformerEncoder(_MaskedStack):
    """Neighbor-masked self-attention.

    Args:
        grid (tuple[int, int]): Rows and columns of the feature map, see :func:`neighbor_mask`, as ``neighbors``.
        dim (int): Number of channels.
        num_layers (int): Number of layers.
        num_heads (int): Attention heads of a layer.
        neighbors (int): Side of the masked square.
    """

    def __init__(self, grid: tuple[int, int], dim: int, num_layers: int, num_heads: int, neighbors: int) -> None:
        super().__init__(grid, neighbors)
        self.layers = nn.ModuleList(_EncoderLayer(dim, num_heads) for _ in range(num_layers))

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Embed tokens (B, N, dim), whose positions have embeddings (N, dim), as a map (B, dim, rows, columns)."""
        for layer in self.layers:
            tokens = layer(tokens, positions, self.mask)
        return tokens.mT.unflatten(2, self.grid)


class QueryDecoder(_MaskedStack):
    """Layer-wise query decoder: in each layer a learned query looks at the embeddings, then at the layer before.

    The arguments are those of :class:`TransformerEncoder` (UniAD, section 3.2).
    """

    def __init__(self, grid: tuple[int, int], dim: int, num_layers: int, num_heads: int, neighbors: int) -> None:
        super().__init__(grid, neighbors)
        self.layers = nn.ModuleList(_DecoderLayer(grid[0] * grid[1], dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Decode a map (B, dim, rows, columns), whose positions have embeddings (N, dim), to tokens (B, N, dim)."""
        output = memory = embeddings.flatten(2).mT
        for layer in self.layers:
            output = layer(output, memory, positions, self.mask)
        return self.norm(output)
