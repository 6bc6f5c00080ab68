# SPDX-License-Identifier: Apache-2.0
"""Partial whitening: standardized feature maps, which are reconstructed, and their fusion into one embedding."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional

__all__ = ["FeatureFusion", "FeatureStandardizer", "at_least_float32", "average_features"]

_NORM = 5.0  # root mean square of an embedding: twice the radius delta = 2.5 of DecAD's best synthetic anomalies
_POWER = 0.5  # exponent of the whitening: 0 leaves variances as they are, 1 makes all of them 1

# Share of the largest variance below which a direction is not stretched further: what is left there may be rounding
# error, above all in bfloat16. The layer norms leave one direction empty; DINOv2's others have 1e-4 and more.
_FLOOR, _TINY = 1e-4, 1e-12


class FeatureStandardizer(nn.Module):
    r"""Whitens each feature map in part: the targets of the reconstruction.

    Channels are brought to mean 0 and variance 1, and then each principal direction, of variance :math:`\lambda`, is
    divided by :math:`\lambda^{1/4}`. Without that, a few large and nearly constant channels of a vision transformer, or
    a few principal directions, decide a cosine similarity alone (``benchmarks/NOTES.md``, "Fusion and normalization").

    Args:
        dim (int): Number of channels.
        num_layers (int): Number of feature maps.
    """

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__()
        self.axes = nn.ModuleList(_Axes(dim) for _ in range(num_layers))

    @torch.no_grad()
    def initialize(self, features: Sequence[torch.Tensor]) -> None:
        """Compute the statistics from feature maps of normal images, (..., dim), one for each layer."""
        for feature, axes in zip(features, cast("Iterable[_Axes]", self.axes), strict=True):
            rows = at_least_float32(feature.flatten(0, -2))
            scale = rows.std(0, correction=0).clamp(min=1e-6)
            axes.set(rows.mean(0), _partial_whitening(rows / scale) / scale)

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Standardize feature maps (..., dim), one for each layer: the same shapes, in float32 or wider."""
        return [axes(feature.detach()) for feature, axes in zip(features, self.axes, strict=True)]


class FeatureFusion(nn.Module):
    r"""Averages the layer-normalized feature maps into one embedding for each patch, along principal axes.

    The axes are those of a sample of normal patches, the direction in which they vary least first: the first channels
    of the latent hold the abnormal component, and start as what normal patches hardly use. A direction of variance
    :math:`\lambda` is divided by :math:`\lambda^{1/4}`, and all by one number that gives the normal embeddings a root
    mean square norm of 5, for any encoder: this is the scale of the radius delta (``benchmarks/NOTES.md``, "Fusion and
    normalization").

    Args:
        dim (int): Number of channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.axes = _Axes(dim)

    @torch.no_grad()
    def initialize(self, features: Sequence[torch.Tensor]) -> None:
        """Compute the axes from feature maps of normal images, (..., dim), one for each layer."""
        rows = average_features(features).flatten(0, -2)
        mean, matrix = rows.mean(0), _partial_whitening(rows)
        norm = ((rows - mean) @ matrix.T).square().sum(-1).mean().sqrt()
        self.axes.set(mean, matrix * _NORM / norm.clamp(min=1e-6))

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse feature maps (..., dim), one for each layer, into embeddings (..., dim), in float32 or wider."""
        return self.axes(average_features(features))


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Widen half-precision numbers to float32; leave others as they are."""
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x


def average_features(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Average layer-normalized feature maps of shape (..., dim), in float32 or wider, without a gradient."""
    normalized = [functional.layer_norm(at_least_float32(f.detach()), f.shape[-1:]) for f in features]
    return torch.stack(normalized).mean(0)


class _Axes(nn.Module):
    """Coordinates along axes: subtracts a mean, then applies a matrix of shape (dim, dim)."""

    mean: torch.Tensor
    matrix: torch.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("matrix", torch.eye(dim))

    def set(self, mean: torch.Tensor, matrix: torch.Tensor) -> None:
        self.mean.copy_(mean)
        self.matrix.copy_(matrix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = (at_least_float32(x) - self.mean).flatten(0, -2)
            # As one matrix product: exported, its weight keeps its name.
            return functional.linear(rows, self.matrix).unflatten(0, x.shape[:-1])


def _partial_whitening(rows: torch.Tensor) -> torch.Tensor:
    """Find the principal axes of (K, dim), each over a power of its variance, the least first, as rows (dim, dim)."""
    # On the CPU, as not every device has float64; correction=0, because a sample may be a single patch.
    variances, axes = torch.linalg.eigh(torch.cov((rows - rows.mean(0)).cpu().double().T, correction=0))
    variances = variances.clamp(min=max(_FLOOR * variances[-1].item(), _TINY))
    return (axes * variances.pow(-_POWER / 2)).T.to(rows.dtype).to(rows.device)
