# SPDX-License-Identifier: Apache-2.0
"""The loss of UniAD and MambaAD."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

__all__ = ["FeatureMSELoss"]


class FeatureMSELoss(nn.Module):
    """Sum over feature maps of the mean squared error of their reconstruction.

    Args:
        weight (float): Factor of the sum: 1 in UniAD, 5 in MambaAD.
            Defaults to ``1.0``.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, features: Sequence[torch.Tensor], reconstructions: Sequence[torch.Tensor]) -> torch.Tensor:
        """Compute the loss.

        Args:
            features (Sequence[torch.Tensor]): Feature maps of any shape.
            reconstructions (Sequence[torch.Tensor]): Their reconstructions, same shapes.

        Returns:
            torch.Tensor: A scalar.
        """
        errors = [
            functional.mse_loss(reconstruction.float(), feature.float())
            for feature, reconstruction in zip(features, reconstructions, strict=True)
        ]
        return self.weight * torch.stack(errors).sum()
