# SPDX-License-Identifier: Apache-2.0
"""What other normal patches of the same image have for their abnormal component."""

import torch
from torch import nn

from anomalib_decad.components.precision import at_least_float32

__all__ = ["ImagePrior", "latent_energy"]

# Start of beta times the mean squared distance between normal components.
_SHARPNESS = 20.0

# By how much the energy of a patch, which is about 1 for normal ones, lowers the logarithm of its weight, and the
# largest energy that counts: logarithms stay within half precision.
_CAUTION, _LARGEST_ENERGY = 6.0, 1000.0

# Patches up to so many rows and columns away are not looked at, as a defect has them, too; fewer in small images.
_RADIUS = 3

# What stands for minus infinity.
_NEVER = -3e4

_RIDGE = 1e-3

# Of the mean variance over the channels: what varies far less than the rest is rounding error.
_FLOOR = 1e-4


class ImagePrior(nn.Module):
    r"""Refines what a prior of prototypes expects by what other patches of the same image have.

    .. math::
        p(z_n, I) = g \odot p(z_n) + h \odot \sum_j w_j z_{a,j}, \qquad
        w = \mathrm{softmax}_j(-\beta \|z_n - z_{n,j}\|^2 - 6 H_j)

    over the patches j of the image I that are more than three rows or columns away, with their energies :math:`H_j` by
    the prototypes alone: what is abnormal itself is hardly looked at. The gains g and h, one for each channel, and
    :math:`\beta` are learned; :meth:`fit` starts the gains as least squares. Textures and repeated parts explain
    themselves in this way, however many prototypes there are (``benchmarks/NOTES.md``, "Values from the image itself").

    Args:
        num_abnormal (int): Channels of the abnormal component.

    Example:
        >>> prior = ImagePrior(num_abnormal=24)
        >>> abnormal, normal, expected = torch.randn(2, 100, 24), torch.randn(2, 100, 8), torch.randn(2, 100, 24)
        >>> prior(abnormal, normal, expected, grid=(10, 10)).shape
        torch.Size([2, 100, 24])
    """

    variance: torch.Tensor

    def __init__(self, num_abnormal: int) -> None:
        super().__init__()
        self.prototype_gain = nn.Parameter(torch.ones(num_abnormal))
        self.image_gain = nn.Parameter(torch.zeros(num_abnormal))
        self.log_beta = nn.Parameter(torch.zeros(()))
        self.register_buffer("variance", torch.ones(num_abnormal))

    def forward(
        self, abnormal: torch.Tensor, normal: torch.Tensor, expected: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """Refine what prototypes expect.

        No gradient goes into the components of the other patches.

        Args:
            abnormal (torch.Tensor): Abnormal components of all patches of images, shape (B, N, num_abnormal).
            normal (torch.Tensor): Normal components, shape (B, N, num_normal).
            expected (torch.Tensor): What prototypes expect, shape (B, N, num_abnormal).
            grid (tuple[int, int]): Patch rows and columns, N = rows * columns.

        Returns:
            torch.Tensor: Abnormal components of shape (B, N, num_abnormal), in float32 or wider.
        """
        with torch.autocast(abnormal.device.type, enabled=False):
            abnormal, normal, expected = (at_least_float32(part) for part in (abnormal, normal, expected))
            seen = self._look(abnormal.detach(), normal.detach(), expected.detach(), grid)
            return self.prototype_gain * expected + self.image_gain * seen

    def follow(self, abnormal: torch.Tensor, expected: torch.Tensor, weight: float) -> None:
        """Follow the variance, by channel, of what prototypes leave of normal patches.

        Args:
            abnormal (torch.Tensor): Abnormal components of normal patches, shape (K, num_abnormal).
            expected (torch.Tensor): What prototypes expect of them.
            weight (float): Share of these in the running mean.
        """
        self.variance.lerp_((abnormal - expected).detach().square().mean(0), weight)

    @torch.no_grad()
    def fit(
        self,
        abnormal: torch.Tensor,
        normal: torch.Tensor,
        expected: torch.Tensor,
        grid: tuple[int, int],
        chosen: torch.Tensor,
    ) -> None:
        """Fit to normal images.

        Args:
            abnormal (torch.Tensor): Abnormal components, shape (B, N, num_abnormal).
            normal (torch.Tensor): Normal components, shape (B, N, num_normal).
            expected (torch.Tensor): What prototypes expect, shape (B, N, num_abnormal).
            grid (tuple[int, int]): Patch rows and columns, N = rows * columns.
            chosen (torch.Tensor): Indices of the patches of each image that the gains are fitted to, shape (B, K).
        """
        self.variance.copy_((abnormal - expected).square().flatten(0, 1).mean(0))
        spread = 2 * normal.flatten(0, 1).var(0, correction=0).sum()
        self.log_beta.copy_((_SHARPNESS / spread.clamp(min=1e-6)).log())
        # Image by image: the weights of all pairs of patches of all images would take gigabytes.
        images = zip(abnormal.unsqueeze(1), normal.unsqueeze(1), expected.unsqueeze(1), strict=True)
        seen = torch.cat([self._look(*image, grid) for image in images])
        index = chosen[..., None].expand(-1, -1, abnormal.shape[-1])
        target, first, second = (tensor.gather(1, index).flatten(0, 1) for tensor in (abnormal, expected, seen))
        # The least squares of two gains, channel by channel.
        ridge = _RIDGE * target.square().mean(0).clamp(min=1e-12)
        a, b, c = first.square().mean(0) + ridge, (first * second).mean(0), second.square().mean(0) + ridge
        u, v = (first * target).mean(0), (second * target).mean(0)
        determinant = a * c - b.square()
        self.prototype_gain.copy_((u * c - v * b) / determinant)
        self.image_gain.copy_((v * a - u * b) / determinant)

    def _look(
        self, abnormal: torch.Tensor, normal: torch.Tensor, expected: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """Average the abnormal components of the other patches of each image."""
        energy = latent_energy(abnormal - expected, self.variance)
        beta = self.log_beta.exp()
        # |z_n|^2 of the patch itself is the same for all others: the softmax does not see it.
        of_others = beta * normal.square().sum(-1) + _CAUTION * energy.clamp(max=_LARGEST_ENERGY)
        logits = 2 * beta * normal @ normal.transpose(-1, -2) - of_others.unsqueeze(-2)
        return (logits + _near(grid, logits.device) * _NEVER).softmax(-1) @ abnormal


def _near(grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Say which patches are too near each other, itself at least: 1 or 0, of shape (N, N)."""
    rows, columns = grid
    radius = min(_RADIUS, (max(grid) - 1) // 3)
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    distance = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
    return (distance <= radius).float()


def latent_energy(residual: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    r"""Compute the energy :math:`\mathrm{mean}((z_a - p(z_n))^2 / \sigma^2)` of abnormal components.

    Args:
        residual (torch.Tensor): Abnormal components less what is expected, :math:`z_a - p(z_n)`, shape
            (..., num_abnormal).
        variance (torch.Tensor): Variance :math:`\sigma^2` of each channel's residual over normal patches, shape
            (num_abnormal,).

    Returns:
        torch.Tensor: Energies of shape (...), not negative, about 1 for normal patches.
    """
    return (residual.square() / variance.clamp(min=_FLOOR * variance.mean())).mean(-1)
