# SPDX-License-Identifier: Apache-2.0
"""Pila, the activation of the invertible network."""

import torch
from torch import nn

from anomalib_decad.ranges import check_range

__all__ = ["Pila", "scaled_pila", "scaled_pila_with_slope"]


class Pila(nn.Module):
    r"""Smooth, exactly 1-Lipschitz activation.

    .. math::
        \mathrm{Pila}(x) = x \text{ for } x \ge 0, \qquad
        \left(\tfrac{k^2 x^3}{2} - k x^2 + x\right) e^{kx} \text{ for } x < 0.

    With :math:`t = kx`, its slope for negative x is :math:`(t^3/2 + t^2/2 - t + 1)\,e^t`: between -0.35
    (at t = -4) and 1 (at t = 0), where it meets the slope of the positive side up to the second derivative.

    Args:
        k (float): Sharpness of the bend at 0; must be positive. Defaults to ``5.0``, as in DecAD's supplement.

    Raises:
        ValueError: If ``k`` is not positive.

    Reference:
        B. Ahn et al., Invertible Monotone Operators for Normalizing Flows, NeurIPS 2022.
    """

    def __init__(self, k: float = 5.0) -> None:
        super().__init__()
        check_range(k > 0, "k", "positive", k)
        self.k = k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the activation element by element, to any shape."""
        return scaled_pila(self.k * x) / (2 * self.k)


def scaled_pila(t: torch.Tensor) -> torch.Tensor:
    r"""Compute :math:`2k\,\mathrm{Pila}(t/k) = t\,(n^2 - 2n + 2)\,e^n` with :math:`n = \min(t, 0)`, for any k.

    The invertible network has the factors k before and 1/(2k) after it in its weights. ``t`` is of any shape.
    """
    return t * _quotient(*_exponential(t))


def scaled_pila_with_slope(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute :func:`scaled_pila` and its derivative by ``t``, both of the shape of ``t``."""
    negative, exponential = _exponential(t)
    quotient = _quotient(negative, exponential)
    # The slope of t (t^2 - 2t + 2) e^t is (t^3 + t^2 - 2t + 2) e^t.
    return t * quotient, torch.addcmul(quotient, negative.pow(3), exponential)


def _exponential(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute min(t, 0) and its exponential; the lower bound keeps t^2 e^t from becoming infinity times zero."""
    negative = t.clamp(-80, 0)
    return negative, negative.exp()


def _quotient(negative: torch.Tensor, exponential: torch.Tensor) -> torch.Tensor:
    # The polynomial n^2 - 2n + 2 is (n - 1)^2 + 1.
    return torch.addcmul(exponential, (negative - 1).square(), exponential)
