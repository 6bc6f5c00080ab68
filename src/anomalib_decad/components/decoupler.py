# SPDX-License-Identifier: Apache-2.0
"""Decoupling: removal of the abnormal component of patch embeddings in the latent space."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from anomalib_decad.components.image_prior import ImagePrior
from anomalib_decad.components.invertible import FrozenNetwork, InvertibleNetwork, NetworkWeights
from anomalib_decad.components.options import DecouplerOptions, InvertibleOptions
from anomalib_decad.components.precision import in_parts
from anomalib_decad.components.prior import ConditionalPrior

__all__ = ["Decoupled", "Decoupler"]

_MOMENTUM = 0.01  # share of a batch in the running variances
_TINY = 1e-12  # smallest variance to divide by


class Decoupled(NamedTuple):
    """Output of :class:`Decoupler`."""

    #: Cleaned embeddings of shape (B, N, dim).
    x_clean: torch.Tensor
    #: Abnormal energy of each patch, shape (B, N), not negative.
    energy: torch.Tensor
    #: Abnormal components before removal, shape (B, N, num_abnormal).
    abnormal: torch.Tensor
    #: Normal components, shape (B, N, dim - num_abnormal).
    normal: torch.Tensor
    #: What removal took from the embeddings, shape (B, N, dim).
    removed: torch.Tensor


class Decoupler(nn.Module):
    r"""Removes what is abnormal from each patch embedding.

    The latent :math:`z = F(x)` is split by channel into :math:`[z_a, z_n]`. The prior of a normal patch is
    :math:`z_a = p(z_n)`, removal is :math:`\hat{x} = F^{-1}([p(z_n), z_n])`, and the abnormal energy of a patch is what
    removal takes from it, :math:`H = \|x - \hat{x}\|^2 / \sigma^2`, with the running mean :math:`\sigma^2` of
    :math:`\|x - \hat{x}\|^2` over normal patches. F and p, a :class:`ConditionalPrior`, act on each patch alone, so
    removal in one patch changes no other. Given the grid of an image's patches, an :class:`ImagePrior` refines p by
    other patches, of which it hardly looks at abnormal ones.

    With a prior of 0, :math:`H = \mathrm{mean}(z_a^2)`, as in the paper. Another prior follows the latent, so that no
    loss bounds the latent's scales: the energy is measured in the embedding, and the ActNorms keep the scales that they
    start with (``benchmarks/NOTES.md``, "Energy").

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
        self.num_abnormal = count = round(dim * options.abnormal_fraction)
        if not 0 < count < dim:
            msg = f"abnormal_fraction must leave channels to both components of {dim}, got {options.abnormal_fraction}"
            raise ValueError(msg)
        has_prior = options.num_prototypes > 0
        prior_size = options.num_prototypes, options.prior_dim
        self.prior = ConditionalPrior(dim - count, count, *prior_size) if has_prior else None
        self.image_prior = ImagePrior(count) if has_prior and options.image_prior else None
        self.register_buffer("removed_variance", torch.ones(()))
        self.network: InvertibleNetwork | FrozenNetwork
        self.network = InvertibleNetwork(dim, invertible, learned_norms=not has_prior)

    def forward(
        self, x: torch.Tensor, grid: tuple[int, int] | None = None, weights: NetworkWeights | None = None
    ) -> Decoupled:
        """Remove the abnormal component.

        Args:
            x (torch.Tensor): Embeddings of shape (B, N, dim).
            grid (tuple[int, int] | None): Patch rows and columns of the images, N = rows * columns. Defaults to
                ``None``: the patches make no images, and the prototypes alone are the prior.
            weights (NetworkWeights | None): From :meth:`fold`. Defaults to ``None``: folded now.

        Returns:
            Decoupled: Cleaned embeddings, abnormal energies and both components.
        """
        weights = weights or self.fold()
        abnormal, normal = self._split(x, weights)
        expected = torch.zeros_like(abnormal) if self.prior is None else self.prior(normal)
        if self.image_prior is not None and grid is not None:
            expected = self.image_prior(abnormal, normal, expected, grid)
        latent = torch.cat([expected, normal], dim=-1)
        x_clean = self.network.inverse(latent, weights)
        removed = x - x_clean
        if self.prior is None:
            energy = abnormal.square().mean(-1)
        else:
            energy = removed.square().mean(-1) / self.removed_variance.clamp(min=_TINY)
        return Decoupled(x_clean, energy, abnormal, normal, removed)

    @torch.no_grad()
    def clean(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Clean embeddings (K, dim), or (B, N, dim) of images with a grid, in bounded memory, without a gradient."""
        weights = self.fold()
        if grid is None:
            return in_parts(lambda rows: self(rows, None, weights).x_clean, x)
        return torch.cat([self(image[None], grid, weights).x_clean for image in x])

    def fold(self) -> NetworkWeights | None:
        """Fold the network's weights once for all passes of a step; ``None`` for a frozen network, which is folded."""
        return self.network.weights() if isinstance(self.network, InvertibleNetwork) else None

    def initialize(self, x: torch.Tensor) -> None:
        """Initialize the network from normal embeddings of shape (..., dim), unless it has been."""
        if isinstance(self.network, InvertibleNetwork):
            self.network.initialize(x)

    def fit_prior(self, x: torch.Tensor, report: Callable[[float], None] | None = None) -> torch.Tensor:
        """Fit the prior, if it is not 0, to normal embeddings (K, dim), and clean them; the network is initialized.

        ``report`` is a progress callback, see :meth:`ConditionalPrior.fit`.
        """
        if self.prior is not None:
            with torch.no_grad():
                abnormal, normal = self._split(x, self.fold())
            self.prior.fit(normal, abnormal, report=report)
        clean = self.clean(x)
        self.removed_variance.copy_((x.detach() - clean).square().mean())
        return clean

    @torch.no_grad()
    def fit_image_prior(self, x: torch.Tensor, grid: tuple[int, int], chosen: torch.Tensor) -> torch.Tensor:
        """Fit the image prior, after the prior; a RuntimeError if there is none.

        Args:
            x (torch.Tensor): Embeddings of normal images, shape (B, N, dim).
            grid (tuple[int, int]): Patch rows and columns, N = rows * columns.
            chosen (torch.Tensor): Indices of patches of each image that stand for all, shape (B, K).

        Returns:
            torch.Tensor: The chosen patches of ``x``, cleaned, shape (B * K, dim).
        """
        if self.prior is None or self.image_prior is None:
            msg = "there is no image prior to fit: it needs num_prototypes above 0 and image_prior=True"
            raise RuntimeError(msg)
        abnormal, normal = self._split(x, self.fold())
        expected = in_parts(self.prior, normal.flatten(0, 1)).view_as(abnormal)
        self.image_prior.fit(abnormal, normal, expected, grid, chosen)
        index = chosen[..., None].expand(-1, -1, x.shape[-1])
        before, clean = (part.gather(1, index).flatten(0, 1) for part in (x, self.clean(x, grid)))
        self.removed_variance.copy_((before - clean).square().mean())
        return clean

    def fuse(self) -> None:
        """Replace the network by its folded weights, in place, for export."""
        if isinstance(self.network, InvertibleNetwork):
            self.network = self.network.frozen()

    def energy(self, x: torch.Tensor, weights: NetworkWeights | None = None) -> torch.Tensor:
        """Compute the abnormal energies (...) of embeddings (..., dim) without grid; ``weights`` of :meth:`fold`."""
        weights = weights or self.fold()
        if self.prior is None:
            return self._split(x, weights)[0].square().mean(-1)
        return self(x, None, weights).energy

    def update_statistics(self, output: Decoupled, perturbed: torch.Tensor) -> torch.Tensor | None:
        """Update the running variances with a random half of the patches, all unperturbed, and measure the prior there.

        No gradient goes into the components: the prior follows the latent, not the other way round
        (``benchmarks/NOTES.md``, "Losses"). The number of patches does not depend on the data: a device never waits for
        it, and can replay a step as a graph.

        Args:
            output (Decoupled): Components of a batch of embeddings.
            perturbed (torch.Tensor): Which patches are not normal, booleans of shape (B, N), at most half of them.

        Returns:
            torch.Tensor | None: The prior's squared errors, shape (K,), in units of each channel's variance; ``None``
                with a prior of 0.
        """
        if self.prior is None:
            return None
        order = torch.rand(perturbed.numel(), device=perturbed.device).masked_fill(perturbed.flatten(), 2).argsort()
        chosen = order[: (perturbed.numel() + 1) // 2]
        parts = output.abnormal, output.normal, output.removed
        abnormal, normal, removed = (part.detach().flatten(0, 1)[chosen] for part in parts)
        errors = (abnormal - self.prior(normal)).square()
        if self.image_prior is not None:
            self.image_prior.variance.lerp_(errors.detach().mean(0), _MOMENTUM)
        self.removed_variance.lerp_(removed.square().mean(), _MOMENTUM)
        scale = abnormal.var(0, correction=0)
        return (errors / scale.clamp(min=1e-6 * scale.mean().clamp(min=_TINY))).mean(-1)

    def _split(self, x: torch.Tensor, weights: NetworkWeights | None) -> tuple[torch.Tensor, torch.Tensor]:
        latent = self.network(x, weights)
        return latent[..., : self.num_abnormal], latent[..., self.num_abnormal :]
