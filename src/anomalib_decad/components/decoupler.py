# SPDX-License-Identifier: Apache-2.0
"""Decoupling: removal of the abnormal component of patch embeddings in the latent space."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from anomalib_decad.components.invertible import FusedNetwork, InvertibleNetwork
from anomalib_decad.components.options import DecouplerOptions, InvertibleOptions
from anomalib_decad.components.prior import ConditionalPrior

__all__ = ["Decoupler"]


class Decoupler(nn.Module):
    r"""Removes what is abnormal from each patch embedding.

    The latent :math:`z = F(x)` is split by channel into :math:`[z_a, z_n]`. The prior of a normal patch is
    :math:`z_a = p(z_n)`, its abnormal energy is :math:`H = \mathrm{mean}((z_a - p(z_n))^2)`, and removal is
    :math:`\hat{x} = F^{-1}([p(z_n), z_n])`. p is 0 or a :class:`ConditionalPrior`. F and p act on each patch alone, so
    removal in one patch changes no other.

    Args:
        dim (int): Number of channels of an embedding; at least 2.
        options (DecouplerOptions): How the latent is split, and its prior.
        invertible (InvertibleOptions): Shape of the invertible network.

    Raises:
        ValueError: If ``abnormal_fraction`` leaves one of the components without channels.

    Example:
        >>> decoupler = Decoupler(dim=32)
        >>> x_clean, energy = decoupler(torch.randn(2, 100, 32))
        >>> x_clean.shape, energy.shape
        (torch.Size([2, 100, 32]), torch.Size([2, 100]))
    """

    def __init__(
        self,
        dim: int,
        options: DecouplerOptions = DecouplerOptions(),
        invertible: InvertibleOptions = InvertibleOptions(),
    ) -> None:
        super().__init__()
        self.num_abnormal = round(dim * options.abnormal_fraction)
        if not 0 < self.num_abnormal < dim:
            msg = f"abnormal_fraction must leave channels to both components of {dim}, got {options.abnormal_fraction}"
            raise ValueError(msg)
        self.prior = (
            ConditionalPrior(dim - self.num_abnormal, self.num_abnormal, options.prior_dim)
            if options.prior_dim
            else None
        )
        self.network: InvertibleNetwork | FusedNetwork = InvertibleNetwork(dim, invertible)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Remove the abnormal component.

        Args:
            x (torch.Tensor): Embeddings of shape (B, N, dim).

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Cleaned embeddings of shape (B, N, dim), and the abnormal energy of each
                patch, shape (B, N), not negative.
        """
        with parametrize.cached():
            abnormal, normal = self._split(x)
            expected = self._expect(abnormal, normal)
            latent = torch.cat([expected, normal], dim=-1)
            return self.network.inverse(latent), (abnormal - expected).square().mean(-1)

    def initialize(self, x: torch.Tensor) -> None:
        """Initialize the network from normal embeddings of shape (..., dim), unless it has been."""
        if isinstance(self.network, InvertibleNetwork):
            self.network.initialize(x)

    def fit_prior(self, x: torch.Tensor) -> None:
        """Fit the prior, if it is not 0, to normal embeddings of shape (K, dim). The network has to be initialized."""
        if self.prior is not None:
            with torch.no_grad():
                abnormal, normal = self._split(x)
            self.prior.fit(normal, abnormal)

    def fuse(self) -> None:
        """Replace the network by a faster one without spectral normalization, in place, for inference."""
        if isinstance(self.network, InvertibleNetwork):
            self.network = self.network.fused()

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the abnormal energy H alone, which needs no inverse.

        Args:
            x (torch.Tensor): Embeddings of shape (..., dim).

        Returns:
            torch.Tensor: Energies of shape (...), not negative.
        """
        abnormal, normal = self._split(x)
        return (abnormal - self._expect(abnormal, normal)).square().mean(-1)

    def _expect(self, abnormal: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        """Give the abnormal component that a normal patch would have."""
        return torch.zeros_like(abnormal) if self.prior is None else self.prior(normal)

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latent = self.network(x)
        return latent[..., : self.num_abnormal], latent[..., self.num_abnormal :]
