# SPDX-License-Identifier: Apache-2.0
"""Adversarial synthesis of anomalies in feature space."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from anomalib_decad.components.precision import at_least_float32

__all__ = ["AdversarialSynthesis"]

# A region covers this share of an image's patches.
_SMALLEST_REGION, _LARGEST_REGION = 0.02, 0.3


class AdversarialSynthesis(nn.Module):
    r"""Perturbs patch embeddings into the anomalies that the model misses most.

    :math:`\tilde{x} = x + \varepsilon` with :math:`\|\varepsilon\|_2 = \delta` on the chosen patches and 0 elsewhere.
    :math:`\varepsilon` starts at a random point of the sphere of radius delta and follows the normalised gradient
    that lowers the energy H of the decoupler, back onto the sphere after each step. Only the gradient of H is needed:
    the encoder is never called, no image is edited.

    The chosen patches are random blobs (smooth noise above a quantile), on a random part of the images.

    Args:
        delta (float): Radius of the perturbation, in units of the embeddings; positive.
            Defaults to ``2.5``, the best value of DecAD's ablation.
        fraction (float): Expected share of images with perturbed patches, in (0, 1].
            Defaults to ``0.5``.
        num_steps (int): Gradient steps; with 0 the perturbation is noise on the sphere.
            Defaults to ``1``.
        step_size (float): Length of a step relative to ``delta``.
            Defaults to ``1.0``.

    Raises:
        ValueError: If an argument is out of its range.

    Reference:
        DecAD, ICCV 2025, supplement: delta = 2.5, normalised gradient of the energy.
    """

    def __init__(self, delta: float = 2.5, fraction: float = 0.5, num_steps: int = 1, step_size: float = 1.0) -> None:
        super().__init__()
        if not delta > 0:
            msg = f"delta must be positive, got {delta}"
            raise ValueError(msg)
        if not 0 < fraction <= 1:
            msg = f"fraction must be in (0, 1], got {fraction}"
            raise ValueError(msg)
        if num_steps < 0:
            msg = f"num_steps must not be negative, got {num_steps}"
            raise ValueError(msg)
        self.delta = delta
        self.fraction = fraction
        self.num_steps = num_steps
        self.step_size = step_size

    def forward(
        self,
        x: torch.Tensor,
        energy: Callable[[torch.Tensor], torch.Tensor],
        grid: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Perturb embeddings.

        Args:
            x (torch.Tensor): Embeddings of shape (B, N, dim); no gradient goes into them.
            energy (Callable): Maps embeddings of shape (K, dim) to abnormal energies of shape (K,).
            grid (tuple[int, int] | None): Patch rows and columns, N = rows * columns.
                Defaults to ``None``: a square grid if N is a square, else one row.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Perturbed embeddings of shape (B, N, dim), and which patches were
                perturbed, booleans of shape (B, N).
        """
        x = x.detach()
        mask = self._choose_patches(x, grid or _square_grid(x.shape[1]))
        chosen = x[mask]
        perturbed = x.clone()
        if len(chosen):
            perturbed[mask] = chosen + self._perturbation(chosen, energy).to(x.dtype)
        return perturbed, mask

    def _perturbation(self, x: torch.Tensor, energy: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = at_least_float32(x)
        eps = self._to_sphere(torch.randn_like(x))
        for _ in range(self.num_steps):
            point = (x + eps).requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(energy(point).sum(), point)
            direction = functional.normalize(gradient, dim=-1)
            eps = self._to_sphere(eps - self.step_size * self.delta * direction)
        return eps

    def _to_sphere(self, eps: torch.Tensor) -> torch.Tensor:
        return self.delta * functional.normalize(eps, dim=-1)

    def _choose_patches(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Draw the masks of the perturbed patches, booleans of shape (B, N)."""
        batch, num_patches = x.shape[:2]
        noise = torch.rand(batch, 1, *(max(side // 4, 2) for side in grid), device=x.device)
        noise = functional.interpolate(noise, size=grid, mode="bicubic", align_corners=True).reshape(batch, num_patches)
        share = torch.empty(batch, 1, device=x.device).uniform_(_SMALLEST_REGION, _LARGEST_REGION)
        rank = noise.argsort(dim=1, descending=True).argsort(dim=1)
        blobs = rank < (share * num_patches).ceil()
        return blobs & (torch.rand(batch, 1, device=x.device) < self.fraction)


def _square_grid(num_patches: int) -> tuple[int, int]:
    side = round(num_patches**0.5)
    return (side, side) if side * side == num_patches else (1, num_patches)
