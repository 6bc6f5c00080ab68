# SPDX-License-Identifier: Apache-2.0
"""Pila, the activation of the invertible network."""

import torch
from torch import nn

from anomalib_decad.ranges import check_range

__all__ = ["Pila"]


class Pila(nn.Module):
    r"""Smooth, exactly 1-Lipschitz activation.

    .. math::
        \mathrm{Pila}(x) = x \text{ for } x \ge 0, \qquad
        \left(\tfrac{k^2 x^3}{2} - k x^2 + x\right) e^{kx} \text{ for } x < 0.

    With :math:`t = kx`, its slope for negative x is :math:`(t^3/2 + t^2/2 - t + 1)\,e^t`: between -0.35
    (at t = -4) and 1 (at t = 0), where it meets the slope of the positive side up to the second derivative.

    Args:
        k (float): Sharpness of the bend at 0; must be positive.
            Defaults to ``5.0``, as in DecAD's supplement.

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
        """Apply the activation element by element.

        Args:
            x (torch.Tensor): Any shape.

        Returns:
            torch.Tensor: Same shape as ``x``.
        """
        # With t = min(kx, 0) the formula for negative x is the identity for the rest: one expression, no branch. The
        # lower bound keeps t^2 e^t from becoming infinity times zero.
        t = (self.k * x).clamp(-80, 0)
        return x * (t * (0.5 * t - 1) + 1) * t.exp()

    @staticmethod
    def scaled(t: torch.Tensor) -> torch.Tensor:
        """Compute 2k Pila(t/k), which is the same for every k, in fewer operations.

        For networks whose weights take up the factors k before and 1/(2k) behind it.

        Args:
            t (torch.Tensor): k times the argument of Pila, any shape.

        Returns:
            torch.Tensor: 2k times Pila, same shape as ``t``.
        """
        negative = t.clamp(-80, 0)
        return t * _quotient(negative, negative.exp())

    @staticmethod
    def scaled_with_slope(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute :meth:`scaled` and its derivative.

        Args:
            t (torch.Tensor): k times the argument of Pila, any shape.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: 2k times Pila and its derivative by ``t``, both of the shape of ``t``.
        """
        negative = t.clamp(-80, 0)
        exponential = negative.exp()
        quotient = _quotient(negative, exponential)
        # The slope of t (t^2 - 2t + 2) e^t is (t^3 + t^2 - 2t + 2) e^t.
        return t * quotient, torch.addcmul(quotient, negative.pow(3), exponential)

    def extra_repr(self) -> str:
        """Describe the arguments."""
        return f"k={self.k}"


def _quotient(negative: torch.Tensor, exponential: torch.Tensor) -> torch.Tensor:
    """Compute :meth:`Pila.scaled` over its argument t, from min(t, 0) and the exponential of that."""
    # The polynomial t^2 - 2t + 2 is (t - 1)^2 + 1.
    shifted = negative - 1
    return torch.addcmul(exponential, shifted.square(), exponential)
