# SPDX-License-Identifier: Apache-2.0
"""How far an abnormal component is from what prototypes expect of a normal patch, in the latent."""

import torch

__all__ = ["latent_energy"]

# Of the mean variance over the channels: what varies far less than the rest is rounding error.
_FLOOR = 1e-4


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
