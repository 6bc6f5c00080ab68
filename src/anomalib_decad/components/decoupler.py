# SPDX-License-Identifier: Apache-2.0
"""Decoupling: removal of the abnormal component of patch embeddings in the latent space, and its losses."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from anomalib_decad.components.invertible import FrozenNetwork, InvertibleNetwork, NetworkWeights
from anomalib_decad.components.options import DecouplerOptions, DecouplingLossOptions, InvertibleOptions
from anomalib_decad.components.prior import PrototypePrior

__all__ = ["Decoupled", "Decoupler", "DecouplingLoss"]

_TINY = 1e-12  # smallest variance to divide by


class Decoupled(NamedTuple):
    """Output of :class:`Decoupler`."""

    #: Cleaned embeddings of shape (B, N, dim).
    x_clean: torch.Tensor
    #: Abnormal energy of each patch, shape (B, N), not negative.
    energy: torch.Tensor


class Decoupler(nn.Module):
    r"""Removes what is abnormal from each patch embedding.

    The latent :math:`z = F(x)` is split by channel into :math:`[z_a, z_n]`. The prior of a normal patch is
    :math:`z_a = p(z_n)`, and removal is :math:`\hat{x} = F^{-1}([p(z_n), z_n])`. F and p act on each patch alone, so
    removal in one patch changes no other.

    With a prior of 0, as in the paper, F is learned, and the abnormal energy of a patch is
    :math:`H = \mathrm{mean}(z_a^2)`. With prototypes (:class:`PrototypePrior`), which are points of its latent space, F
    stays as it starts, along the principal axes of the embeddings, and the energy is what removal takes from a patch,
    :math:`H = \|x - \hat{x}\|^2 / \sigma^2`, with the mean :math:`\sigma^2` of :math:`\|x - \hat{x}\|^2` over normal
    patches (``benchmarks/NOTES.md``, "Prototypes of each product").

    Args:
        dim (int): Number of channels of an embedding; at least 2.
        options (DecouplerOptions): How the latent is split, and its prior.
        invertible (InvertibleOptions): Shape of the invertible network.

    Raises:
        ValueError: If ``abnormal_fraction`` leaves one of the components without channels.

    Example:
        >>> decoupler = Decoupler(dim=32, options=DecouplerOptions(num_prototypes=0))
        >>> output = decoupler(torch.randn(2, 100, 32))
        >>> output.x_clean.shape, output.energy.shape
        (torch.Size([2, 100, 32]), torch.Size([2, 100]))
    """

    removed_variance: torch.Tensor

    def __init__(
        self,
        dim: int,
        options: DecouplerOptions = DecouplerOptions(),
        invertible: InvertibleOptions = InvertibleOptions(),
    ) -> None:
        super().__init__()
        self.num_abnormal = count = round(dim * options.abnormal_fraction)
        if not 0 < count < dim:
            msg = f"abnormal_fraction must leave channels to both components of {dim}, got {options.abnormal_fraction}"
            raise ValueError(msg)
        self.num_prototypes = options.num_prototypes
        has_prior = options.num_prototypes > 0
        self.prior = PrototypePrior(dim - count, count, options.num_neighbors) if has_prior else None
        self.register_buffer("removed_variance", torch.ones(()))
        self.network: InvertibleNetwork | FrozenNetwork
        self.network = InvertibleNetwork(dim, invertible).requires_grad_(not has_prior)

    def forward(
        self,
        x: torch.Tensor,
        product: torch.Tensor | None = None,
        without: torch.Tensor | None = None,
        weights: NetworkWeights | None = None,
    ) -> Decoupled:
        """Remove the abnormal component.

        Args:
            x (torch.Tensor): Embeddings of shape (B, N, dim); (..., dim) with a prior of 0.
            product (torch.Tensor | None): Index of the product that each image shows, shape (B,). Defaults to ``None``:
                the first.
            without (torch.Tensor | None): Images that prototypes were taken from which do not explain these, see
                :meth:`PrototypePrior.forward`, shape (B,). Defaults to ``None``: all explain them.
            weights (NetworkWeights | None): From :meth:`fold`. Defaults to ``None``: folded now.

        Returns:
            Decoupled: Cleaned embeddings and abnormal energies.
        """
        weights = weights or self.fold()
        abnormal, normal = self.split(x, weights)
        if self.prior is None:
            expected = torch.zeros_like(abnormal)
        else:
            product = torch.zeros(len(x), dtype=torch.long, device=x.device) if product is None else product
            expected = self.prior(normal, product, without)
        x_clean = self.network.inverse(torch.cat([expected, normal], dim=-1), weights)
        if self.prior is None:
            return Decoupled(x_clean, abnormal.square().mean(-1))
        return Decoupled(x_clean, (x - x_clean).square().mean(-1) / self.removed_variance.clamp(min=_TINY))

    def fold(self) -> NetworkWeights | None:
        """Fold the network's weights once for all passes of a step; ``None`` for a frozen network, which is folded."""
        return self.network.weights() if isinstance(self.network, InvertibleNetwork) else None

    def initialize(self, x: torch.Tensor) -> None:
        """Initialize the network from normal embeddings of shape (..., dim), unless it has been."""
        if isinstance(self.network, InvertibleNetwork):
            self.network.initialize(x)

    def fuse(self) -> None:
        """Replace the network by its folded weights, in place, for export."""
        if isinstance(self.network, InvertibleNetwork):
            self.network = FrozenNetwork(self.network.fold(converged=True))

    def energy(self, x: torch.Tensor, weights: NetworkWeights | None = None) -> torch.Tensor:
        """Compute the abnormal energies (...) of embeddings (..., dim) with a prior of 0."""
        return self.split(x, weights or self.fold())[0].square().mean(-1)

    def split(self, x: torch.Tensor, weights: NetworkWeights | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Map embeddings (..., dim) to their abnormal and normal components (..., channels)."""
        latent = self.network(x, weights or self.fold())
        return latent[..., : self.num_abnormal], latent[..., self.num_abnormal :]


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
