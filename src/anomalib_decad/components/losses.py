# SPDX-License-Identifier: Apache-2.0
"""Losses of decoupling and of reconstructed features."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from anomalib_decad.components.options import DecouplingLossOptions

__all__ = ["DecouplingLoss", "FeatureMSELoss"]


class DecouplingLoss(nn.Module):
    r"""The terms that train the decoupling.

    - ``normal_energy``: mean abnormal energy H of unperturbed patches, which trains the latent, too.
    - ``abnormal_energy``: mean hinge :math:`\max(0, m - H)` of perturbed patches.
    - ``restoration``: :math:`\|\hat{x} - x\|^2 / \|x\|^2`, each averaged over the patches, with x the embedding before
      perturbation: removal restores it.

    Args:
        options (DecouplingLossOptions): Their weights, and the margin m.
    """

    def __init__(self, options: DecouplingLossOptions = DecouplingLossOptions()) -> None:
        super().__init__()
        self.options = options

    def forward(
        self,
        x: torch.Tensor,
        x_clean: torch.Tensor,
        energy: torch.Tensor,
        perturbed: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Compute the terms whose weight is not 0, times their weights; the loss is their sum.

        Args:
            x (torch.Tensor): Embeddings before perturbation, shape (B, N, dim).
            x_clean (torch.Tensor): Embeddings after removal, shape (B, N, dim).
            energy (torch.Tensor): Abnormal energies of the perturbed embeddings, shape (B, N).
            perturbed (torch.Tensor): Which patches were perturbed, booleans of shape (B, N).

        Returns:
            dict[str, torch.Tensor]: Scalars by the names above.
        """
        options, terms = self.options, {}
        if options.normal_weight:
            terms["normal_energy"] = options.normal_weight * _mean(energy, ~perturbed)
        if options.abnormal_weight:
            hinge = functional.relu(options.margin - energy)
            terms["abnormal_energy"] = options.abnormal_weight * _mean(hinge, perturbed)
        if options.restoration_weight:
            terms["restoration"] = options.restoration_weight * (x_clean - x).square().mean() / x.square().mean()
        return terms


def _mean(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean over the chosen values, 0 for none: a batch may have no perturbed patch."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


class FeatureMSELoss(nn.Module):
    """Sum over feature maps of the mean squared error of their reconstruction.

    Args:
        weight (float): Factor of the sum: 1 in UniAD, 5 in MambaAD. Defaults to ``1.0``.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, features: Sequence[torch.Tensor], reconstructions: Sequence[torch.Tensor]) -> torch.Tensor:
        """Compute the loss, a scalar, of feature maps of any shapes and their reconstructions of the same shapes."""
        pairs = zip(reconstructions, features, strict=True)
        return self.weight * torch.stack([functional.mse_loss(a.float(), b.float()) for a, b in pairs]).sum()
