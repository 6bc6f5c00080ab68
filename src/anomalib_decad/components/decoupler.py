# SPDX-License-Identifier: Apache-2.0
"""Decoupling: removal of the abnormal component of patch embeddings in the latent space."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import nn

from anomalib_decad.components.image_prior import ImagePrior
from anomalib_decad.components.in_parts import in_parts
from anomalib_decad.components.invertible import FusedNetwork, InvertibleNetwork
from anomalib_decad.components.options import DecouplerOptions, InvertibleOptions
from anomalib_decad.components.prior import ConditionalPrior

__all__ = ["Decoupled", "Decoupler"]

# Share of a batch in the running variance.
_MOMENTUM = 0.01

# Of a variance that is divided by.
_TINY = 1e-12


class Decoupled(NamedTuple):
    """What :class:`Decoupler` returns.

    Args:
        x_clean (torch.Tensor): Cleaned embeddings of shape (B, N, dim).
        energy (torch.Tensor): Abnormal energy of each patch, shape (B, N), not negative.
        abnormal (torch.Tensor): Abnormal components before removal, shape (B, N, num_abnormal).
        normal (torch.Tensor): Normal components, shape (B, N, dim - num_abnormal).
        removed (torch.Tensor): What removal took from the embeddings, shape (B, N, dim).
    """

    x_clean: torch.Tensor
    energy: torch.Tensor
    abnormal: torch.Tensor
    normal: torch.Tensor
    removed: torch.Tensor


class Decoupler(nn.Module):
    r"""Removes what is abnormal from each patch embedding.

    The latent :math:`z = F(x)` is split by channel into :math:`[z_a, z_n]`. The prior of a normal patch is
    :math:`z_a = p(z_n)`, removal is :math:`\hat{x} = F^{-1}([p(z_n), z_n])`, and the abnormal energy of a patch is what
    removal takes from it, :math:`H = \|x - \hat{x}\|^2 / \sigma^2`. p is a :class:`ConditionalPrior`, or 0. F and p act
    on each patch alone, so removal in one patch changes no other.

    Given the grid of the images that the patches make, an :class:`ImagePrior` refines p by other normal patches of the
    same image. An abnormal patch is hardly looked at, so its removal hardly changes others.

    :math:`\sigma^2` is the mean of :math:`\|x - \hat{x}\|^2` over normal patches, a running mean over the training: a
    normal patch has an energy of about 1. It is measured in the embedding, whose scales are fixed. A prior other than 0
    follows the latent, so no loss depends on the latent's scales: in long trainings one direction outgrows all others,
    and would be the energy (``benchmarks/NOTES.md``, "Energy"). For the same reason the ActNorms keep the scales that
    they start with. With a prior of 0 the latent has scales of its own, and :math:`H = \mathrm{mean}(z_a^2)`, as in the
    paper.

    Args:
        dim (int): Number of channels of an embedding; at least 2.
        options (DecouplerOptions): How the latent is split, and its prior.
        invertible (InvertibleOptions): Shape of the invertible network.

    Raises:
        ValueError: If ``abnormal_fraction`` leaves one of the components without channels.

    Example:
        >>> decoupler = Decoupler(dim=32, options=DecouplerOptions(num_prototypes=16))
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
        self.num_abnormal = round(dim * options.abnormal_fraction)
        if not 0 < self.num_abnormal < dim:
            msg = f"abnormal_fraction must leave channels to both components of {dim}, got {options.abnormal_fraction}"
            raise ValueError(msg)
        self.prior = (
            ConditionalPrior(dim - self.num_abnormal, self.num_abnormal, options.num_prototypes, options.prior_dim)
            if options.num_prototypes
            else None
        )
        self.image_prior = ImagePrior(self.num_abnormal) if options.num_prototypes and options.image_prior else None
        self.register_buffer("removed_variance", torch.ones(()))
        learned = options.num_prototypes == 0
        self.network: InvertibleNetwork | FusedNetwork = InvertibleNetwork(dim, invertible, learned_norms=learned)

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> Decoupled:
        """Remove the abnormal component.

        Args:
            x (torch.Tensor): Embeddings of shape (B, N, dim).
            grid (tuple[int, int] | None): Patch rows and columns of the images, N = rows * columns.
                Defaults to ``None``: the patches make no images, and the prototypes alone are the prior.

        Returns:
            Decoupled: Cleaned embeddings, abnormal energies and both components.
        """
        with self.folded():
            abnormal, normal = self._split(x)
            expected = self._expect(abnormal, normal, grid)
            x_clean = self.network.inverse(torch.cat([expected, normal], dim=-1))
            removed = x - x_clean
            return Decoupled(x_clean, self._energy(abnormal, removed), abnormal, normal, removed)

    @torch.no_grad()
    def clean(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Remove the abnormal component of any number of embeddings, in bounded memory and without a gradient.

        Args:
            x (torch.Tensor): Embeddings of shape (K, dim), or of images, of shape (B, N, dim).
            grid (tuple[int, int] | None): Patch rows and columns of the images.
                Defaults to ``None``: the patches make no images.

        Returns:
            torch.Tensor: Cleaned embeddings of the same shape.
        """
        with self.folded():
            if grid is None:
                return in_parts(lambda rows: self(rows).x_clean, x)
            return torch.cat([self(image[None], grid).x_clean for image in x])

    def folded(self) -> AbstractContextManager[None]:
        """Compute the network's weights once for all passes within, as those of a training step."""
        return self.network.folded() if isinstance(self.network, InvertibleNetwork) else nullcontext()

    def initialize(self, x: torch.Tensor) -> None:
        """Initialize the network from normal embeddings of shape (..., dim), unless it has been."""
        if isinstance(self.network, InvertibleNetwork):
            self.network.initialize(x)

    def fit_prior(self, x: torch.Tensor, report: Callable[[float], None] | None = None) -> torch.Tensor:
        """Fit the prior, if it is not 0. The network has to be initialized.

        Args:
            x (torch.Tensor): Normal embeddings of shape (K, dim).
            report (Callable[[float], None] | None): Is told now and then which part has been done, in [0, 1].
                Defaults to ``None``: nobody is.

        Returns:
            torch.Tensor: ``x``, cleaned, shape (K, dim).
        """
        if self.prior is not None:
            with torch.no_grad():
                abnormal, normal = self._split(x)
            self.prior.fit(normal, abnormal, report=report)
        clean = self.clean(x)
        self.removed_variance.copy_((x.detach() - clean).square().mean())
        return clean

    @torch.no_grad()
    def fit_image_prior(self, x: torch.Tensor, grid: tuple[int, int], chosen: torch.Tensor) -> torch.Tensor:
        """Fit what refines the prior by other patches of the same image. The prior has been fitted.

        Args:
            x (torch.Tensor): Embeddings of normal images, shape (B, N, dim).
            grid (tuple[int, int]): Patch rows and columns, N = rows * columns.
            chosen (torch.Tensor): Indices of patches of each image that stand for all, shape (B, K).

        Returns:
            torch.Tensor: The chosen patches of ``x``, cleaned, shape (B * K, dim).

        Raises:
            RuntimeError: If there is no image prior.
        """
        if self.prior is None or self.image_prior is None:
            msg = "there is no image prior to fit: it needs num_prototypes above 0 and image_prior=True"
            raise RuntimeError(msg)
        with self.folded():
            abnormal, normal = self._split(x)
            expected = self.prior.predict(normal.flatten(0, 1)).view_as(abnormal)
            self.image_prior.fit(abnormal, normal, expected, grid, chosen)
            index = chosen[..., None].expand(-1, -1, x.shape[-1])
            before, clean = (part.gather(1, index).flatten(0, 1) for part in (x, self.clean(x, grid)))
            self.removed_variance.copy_((before - clean).square().mean())
            return clean

    def fuse(self) -> None:
        """Replace the network by a faster one without spectral normalization, in place, for inference."""
        if isinstance(self.network, InvertibleNetwork):
            self.network = self.network.fused()

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the abnormal energy H alone, by the prototypes alone, which needs no images.

        Args:
            x (torch.Tensor): Embeddings of shape (..., dim).

        Returns:
            torch.Tensor: Energies of shape (...), not negative.
        """
        if self.prior is None:
            return self._split(x)[0].square().mean(-1)
        return self(x).energy

    def prior_error(self, output: Decoupled, perturbed: torch.Tensor) -> torch.Tensor | None:
        """Compute how far the prior is from the components of normal patches, as a loss of the prior alone.

        No gradient goes into the components: the prior follows the latent. If the latent followed the prior, the
        network would make abnormal components easy to predict instead of telling, and the energy would get worse with
        training (``benchmarks/NOTES.md``, "Losses"). In training mode the variance of what is removed from normal
        patches follows, too. A random half of the patches does as well as all of them, at half the price.

        Args:
            output (Decoupled): Components of a batch of embeddings.
            perturbed (torch.Tensor): Which patches are not normal, booleans of shape (B, N), at most half of them.

        Returns:
            torch.Tensor | None: Shape (B * N / 2,), in units of the variance of each channel; ``None`` with a prior
                of 0.
        """
        if self.prior is None:
            return None
        order = torch.rand(perturbed.numel(), device=perturbed.device).masked_fill(perturbed.flatten(), 2).argsort()
        # The number does not depend on the data: a device never waits, and can replay the step as a graph.
        chosen = order[: (perturbed.numel() + 1) // 2]
        abnormal, normal = (part.detach().flatten(0, 1)[chosen] for part in (output.abnormal, output.normal))
        expected = self.prior(normal)
        error = (abnormal - expected).square()
        if self.training:
            if self.image_prior is not None:
                self.image_prior.follow(abnormal, expected, _MOMENTUM)
            removed = output.removed.detach().flatten(0, 1)[chosen]
            self.removed_variance.lerp_(removed.square().mean(), _MOMENTUM)
        scale = abnormal.var(0, correction=0)
        return (error / scale.clamp(min=1e-6 * scale.mean().clamp(min=1e-12))).mean(-1)

    def _energy(self, abnormal: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
        """Compute energies of abnormal components, shape (..., num_abnormal), and what is removed, (..., dim)."""
        if self.prior is None:
            return abnormal.square().mean(-1)
        return removed.square().mean(-1) / self.removed_variance.clamp(min=_TINY)

    def _expect(
        self, abnormal: torch.Tensor, normal: torch.Tensor, grid: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Give the abnormal component that a normal patch would have."""
        if self.prior is None:
            return torch.zeros_like(abnormal)
        expected = self.prior(normal)
        if self.image_prior is None or grid is None:
            return expected
        return self.image_prior(abnormal, normal, expected, grid)

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latent = self.network(x)
        return latent[..., : self.num_abnormal], latent[..., self.num_abnormal :]
