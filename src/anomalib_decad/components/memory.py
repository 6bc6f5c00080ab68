# SPDX-License-Identifier: Apache-2.0
"""A memory of normal embeddings."""

import torch
from anomalib.models.components.cluster import KMeans
from torch import nn

from anomalib_decad.components.precision import at_least_float32, linear_rows

__all__ = ["PrototypeMemory"]


class PrototypeMemory(nn.Module):
    r"""Replaces each embedding by a mixture of prototypes of normal ones.

    :math:`m(x) = \sum_i w_i v_i` with :math:`w = \mathrm{softmax}(-\beta \|x - k_i\|^2)`: attention to prototypes with
    keys :math:`k_i`, values :math:`v_i` and sharpness :math:`\beta`, all learned. Keys and values start as cluster
    centers of normal embeddings. Nothing of the input bypasses the prototypes, so an anomaly cannot be copied.

    Measured (``benchmarks/NOTES.md``, "Accuracy"): after 150 steps a decoder of transformer blocks alone reaches a mean
    of the seven metrics of 77 by its errors, and 82 behind a memory.

    Args:
        dim (int): Number of channels of an embedding.
        num_prototypes (int): Number of prototypes; at least 1.
            Defaults to ``2560``.
        sharpness (float): Start of beta times the mean squared distance between embeddings and keys; positive.
            Defaults to ``20.0``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, dim: int, num_prototypes: int = 2560, sharpness: float = 20.0) -> None:
        super().__init__()
        if num_prototypes < 1:
            msg = f"num_prototypes must be at least 1, got {num_prototypes}"
            raise ValueError(msg)
        if not sharpness > 0:
            msg = f"sharpness must be positive, got {sharpness}"
            raise ValueError(msg)
        self.sharpness = sharpness
        self.keys = nn.Parameter(torch.randn(num_prototypes, dim))
        self.values = nn.Parameter(self.keys.detach().T.clone())
        self.log_beta = nn.Parameter(torch.tensor(sharpness / (2 * dim)).log())

    @torch.no_grad()
    def initialize(self, x: torch.Tensor, max_iter: int = 6) -> None:
        """Set the prototypes to cluster centers.

        Args:
            x (torch.Tensor): Normal embeddings of shape (K, dim).
            max_iter (int): Iterations of k-means.
        """
        _, centers = KMeans(len(self.keys), max_iter).fit(x)
        self.keys.copy_(centers)
        self.values.copy_(centers.T)
        distance = torch.cdist(x, centers).square().mean().clamp(min=1e-6)
        self.log_beta.copy_((self.sharpness / distance).log())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Look embeddings up.

        Args:
            x (torch.Tensor): Embeddings of shape (..., dim).

        Returns:
            torch.Tensor: Mixtures of prototypes, shape (..., dim). Under automatic mixed precision their weights are
                computed in float32, as they are exponentials of differences between large numbers, and the mean of the
                values that they weigh in the lower precision.
        """
        with torch.autocast(x.device.type, enabled=False):
            beta = self.log_beta.exp()
            # |x|^2 is the same for all prototypes: the softmax does not see it.
            similarity = linear_rows(2 * beta * at_least_float32(x), self.keys, -beta * self.keys.square().sum(-1))
            weights = similarity.softmax(-1)
        return linear_rows(weights, self.values)
