# SPDX-License-Identifier: Apache-2.0
"""Refinement of the prior by other normal patches of the same image."""

import torch
from torch import nn

from anomalib_decad.components.precision import at_least_float32

__all__ = ["ImagePrior", "latent_energy"]

Grid = tuple[int, int]

_SHARPNESS = 20.0  # start of beta times the mean squared distance between normal components

# By how much the energy of a patch, which is about 1 for normal ones, lowers the logarithm of its weight, and the
# largest energy that counts: logarithms stay within half precision, and so does what stands for minus infinity.
_CAUTION, _LARGEST_ENERGY, _NEVER = 6.0, 1000.0, -3e4

# Patches up to so many rows and columns away are not looked at, as a defect has them, too; fewer in small images.
_RADIUS = 3

_RIDGE = 1e-3
_FLOOR = 1e-4  # of the mean variance over the channels: what varies far less than the rest is rounding error


class ImagePrior(nn.Module):
    r"""Refines what a prior of prototypes expects by the components of other patches of the same image.

    .. math::
        p(z_n, I) = g \odot p(z_n) + h \odot \sum_j w_j z_{a,j}, \qquad
        w = \mathrm{softmax}_j(-\beta \|z_n - z_{n,j}\|^2 - 6 H_j)

    over the patches j of the image I that are more than three rows or columns away, with their energies :math:`H_j` by
    the prototypes alone, so that abnormal patches hardly count. The gains g and h, one for each channel, and
    :math:`\beta` are learned; :meth:`fit` starts the gains as least squares. Textures and repeated parts explain
    themselves in this way (``benchmarks/NOTES.md``, "Values from the image itself").

    Args:
        num_abnormal (int): Channels of the abnormal component.

    Example:
        >>> prior = ImagePrior(num_abnormal=24)
        >>> abnormal, normal, expected = torch.randn(2, 100, 24), torch.randn(2, 100, 8), torch.randn(2, 100, 24)
        >>> prior(abnormal, normal, expected, grid=(10, 10)).shape
        torch.Size([2, 100, 24])
    """

    #: Of what prototypes leave of normal patches, by channel; updated in training by the decoupler.
    variance: torch.Tensor

    def __init__(self, num_abnormal: int) -> None:
        super().__init__()
        self.prototype_gain = nn.Parameter(torch.ones(num_abnormal))
        self.image_gain = nn.Parameter(torch.zeros(num_abnormal))
        self.log_beta = nn.Parameter(torch.zeros(()))
        self.register_buffer("variance", torch.ones(num_abnormal))

    def forward(self, abnormal: torch.Tensor, normal: torch.Tensor, expected: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Refine what prototypes expect. No gradient goes into the components of the other patches.

        Args:
            abnormal (torch.Tensor): Abnormal components of all patches of images, shape (B, N, num_abnormal).
            normal (torch.Tensor): Normal components, shape (B, N, num_normal).
            expected (torch.Tensor): Prior of the prototypes, shape (B, N, num_abnormal).
            grid (tuple[int, int]): Patch rows and columns, N = rows * columns.

        Returns:
            torch.Tensor: Abnormal components of shape (B, N, num_abnormal), in float32 or wider.
        """
        with torch.autocast(abnormal.device.type, enabled=False):
            abnormal, normal, expected = (at_least_float32(part) for part in (abnormal, normal, expected))
            seen = self._look(abnormal.detach(), normal.detach(), expected.detach(), grid)
            return self.prototype_gain * expected + self.image_gain * seen

    @torch.no_grad()
    def fit(
        self, abnormal: torch.Tensor, normal: torch.Tensor, expected: torch.Tensor, grid: Grid, chosen: torch.Tensor
    ) -> None:
        """Fit to normal images, as in :meth:`forward`, the gains to the patches ``chosen``: indices (B, K)."""
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

    def _look(self, abnormal: torch.Tensor, normal: torch.Tensor, expected: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Average the abnormal components of the other patches of each image."""
        energy = latent_energy(abnormal - expected, self.variance)
        beta = self.log_beta.exp()
        # |z_n|^2 of the patch itself is the same for all others: the softmax does not see it.
        of_others = beta * normal.square().sum(-1) + _CAUTION * energy.clamp(max=_LARGEST_ENERGY)
        logits = 2 * beta * normal @ normal.transpose(-1, -2) - of_others.unsqueeze(-2)
        return (logits + _near(grid, logits.device) * _NEVER).softmax(-1) @ abnormal


def _near(grid: Grid, device: torch.device) -> torch.Tensor:
    """Mark the patches that are too near each other, itself at least: 1 or 0, of shape (N, N)."""
    rows, columns = grid
    radius = min(_RADIUS, (max(grid) - 1) // 3)
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    distance = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
    return (distance <= radius).float()


def latent_energy(residual: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Compute the mean square of residuals (..., num_abnormal) over their variance (num_abnormal,), shape (...)."""
    return (residual.square() / variance.clamp(min=_FLOOR * variance.mean())).mean(-1)
