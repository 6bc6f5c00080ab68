# SPDX-License-Identifier: Apache-2.0
"""Standardisation of the tapped feature maps, and their fusion into one embedding for each patch."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import nn

from anomalib_decad.components.precision import at_least_float32

__all__ = ["FeatureStandardiser", "fuse"]

# Factor of an embedding times the root of its dimension: brings its norm to about 4, whatever the encoder.
_SCALE = 5.0

# Far below the variance of any channel, which for DINOv2 goes down to 1e-3.
_EPS = 1e-8


class FeatureStandardiser(nn.Module):
    """Brings each channel of each feature map to mean 0 and variance 1 over the training images.

    A few channels of a vision transformer's residual stream are orders of magnitude larger than the rest and nearly
    constant. Without standardisation they alone decide a cosine similarity. The statistics are running means over all
    training batches.

    Measured with DINOv2 ViT-S/14 at 280 pixels on MVTec AD's bottle, grid and toothbrush and a third of the magnetic
    tiles, after 100 steps of 8 images, one seed: the mean of the seven metrics is 75.0 with it and 70.0 with layer
    normalisation of the embedding and cosines of the raw features.

    Args:
        dim (int): Number of channels.
        num_taps (int): Number of feature maps.
    """

    def __init__(self, dim: int, num_taps: int) -> None:
        super().__init__()
        # momentum=None: cumulative averages
        self.statistics = nn.ModuleList(
            nn.BatchNorm1d(dim, eps=_EPS, affine=False, momentum=None) for _ in range(num_taps)
        )

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Standardise feature maps; in training mode, also update the statistics.

        Args:
            features (Sequence[torch.Tensor]): Feature maps of shape (B, N, dim), one for each tap.

        Returns:
            list[torch.Tensor]: Standardised feature maps of the same shapes, in float32 or wider.
        """
        return [
            self._standardise(feature, statistics)
            for feature, statistics in zip(features, cast("Iterable[nn.BatchNorm1d]", self.statistics), strict=True)
        ]

    @staticmethod
    def _standardise(feature: torch.Tensor, statistics: nn.BatchNorm1d) -> torch.Tensor:
        feature = at_least_float32(feature.detach())
        if statistics.training:
            statistics(feature.flatten(0, -2))
        # Always by the running statistics: those of a batch depend on which categories are in it.
        scale = (cast("torch.Tensor", statistics.running_var) + _EPS).rsqrt()
        shift = -cast("torch.Tensor", statistics.running_mean) * scale
        return torch.addcmul(shift, feature, scale)


def fuse(features: Sequence[torch.Tensor]) -> torch.Tensor:
    r"""Average feature maps into one embedding for each patch.

    The mean is scaled by :math:`5/\sqrt{dim}`, which brings the norm of an embedding to about 4 for encoders of any
    width. This is the scale at which a perturbation of radius 2.5 is a meaningful one. Measured as in
    :class:`FeatureStandardiser`, but for 80 steps: without the factor (norm 15)
    adversarial patches keep a lower abnormal energy than normal ones, 0.18 against 0.39, and the energy alone reaches
    a mean of the seven metrics of 63.6; with the ratio of radius to norm that the factor gives, they have 2.07 against
    0.27, and the energy alone reaches 69.4.

    Args:
        features (Sequence[torch.Tensor]): Standardised feature maps of shape (B, N, dim).

    Returns:
        torch.Tensor: Embeddings of shape (B, N, dim).
    """
    return torch.stack(list(features)).mean(0) * (_SCALE / features[0].shape[-1] ** 0.5)
