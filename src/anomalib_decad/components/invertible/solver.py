# SPDX-License-Identifier: Apache-2.0
"""The fixed point of a chain of units, with its implicit gradient."""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from anomalib_decad.components.invertible.pila import scaled_pila, scaled_pila_with_slope

__all__ = ["ChainWeights", "iterate", "solve"]

# Of the implicit gradient; each gains about a digit.
BACKWARD_ITERATIONS = 2


class ChainWeights(NamedTuple):
    r"""Weights of a chain of units in one direction, from which all that does not depend on the input is computed.

    The hidden channels v of all units solve one equation, :math:`v + M D(v) = Cx + c` (see :func:`fold`), and the
    output of the chain is :math:`s \odot x + O\,D(v) + o`. D, the dense layers of all units, is nearly linear: with J
    its Jacobian if Pila had the slope 0.6 everywhere, and :math:`K = (I + M J)^{-1}`,

    .. math:: v \leftarrow v - K\,(v + M D(v) - Cx - c)

    has the same fixed point as the plain iteration :math:`v \leftarrow Cx + c - M D(v)`, which is the one with K = I,
    and costs the same, as K is multiplied into the weights. Each iteration gains about a digit.

    Args:
        start_weight (torch.Tensor): K C, shape (hidden, dim).
        start_bias (torch.Tensor): K c, shape (hidden,).
        first_weight (torch.Tensor): Weight of the first dense layer, shape (growth, hidden).
        first_bias (torch.Tensor): Its bias.
        second_weight (torch.Tensor): Weight of the second one, shape (growth, hidden + growth).
        second_bias (torch.Tensor): Its bias.
        update_weight (torch.Tensor): K M, less I - K in the columns of v, shape (hidden, hidden + 2 growth).
        output_weight (torch.Tensor): O, shape (dim, hidden + 2 growth).
        output_bias (torch.Tensor): o, shape (dim,).
        scale (torch.Tensor): s, shape (dim,).
    """

    start_weight: torch.Tensor
    start_bias: torch.Tensor
    first_weight: torch.Tensor
    first_bias: torch.Tensor
    second_weight: torch.Tensor
    second_bias: torch.Tensor
    update_weight: torch.Tensor
    output_weight: torch.Tensor
    output_bias: torch.Tensor
    scale: torch.Tensor

    def dense(self, v: torch.Tensor) -> torch.Tensor:
        """Compute D of shape (N, hidden + 2 growth), which begins with ``v`` of shape (N, hidden)."""
        for weight, bias in ((self.first_weight, self.first_bias), (self.second_weight, self.second_bias)):
            v = torch.cat([v, scaled_pila(linear(v, weight, bias))], dim=-1)
        return v


def solve(weights: ChainWeights, x: torch.Tensor, iterations: int, dtype: torch.dtype) -> torch.Tensor:
    """Apply a chain of units by a fixed number of iterations.

    The number never depends on the data, so that ``torch.export`` unrolls it. Where a gradient is needed, the backward
    pass solves the adjoint equation by the same kind of iteration: memory does not grow with the number of iterations.

    Args:
        weights (ChainWeights): Weights of the chain.
        x (torch.Tensor): Input of shape (N, dim).
        iterations (int): Iterations.
        dtype (torch.dtype): Precision of D; the input bypasses it in its own.

    Returns:
        torch.Tensor: Output of shape (N, dim).

    Reference:
        S. Bai et al., Deep Equilibrium Models, NeurIPS 2019 (implicit differentiation).
    """
    rounded = ChainWeights(*(tensor.to(dtype) for tensor in weights))
    start = linear(x.to(dtype), rounded.start_weight, rounded.start_bias)
    if torch.is_grad_enabled():
        features = _FixedPoint.apply(iterations, start, *rounded)
    else:
        features = rounded.dense(iterate(rounded, start, start, iterations))
    return torch.addcmul(linear(features, rounded.output_weight, rounded.output_bias), x, weights.scale)


def iterate(weights: ChainWeights, start: torch.Tensor, v: torch.Tensor, iterations: int) -> torch.Tensor:
    """Iterate from ``v``; ``start`` solves the equation for a linear D. All are of shape (N, hidden)."""
    for _ in range(iterations):
        v = torch.addmm(start, weights.dense(v), weights.update_weight.mT, alpha=-1)
    return v


class _FixedPoint(torch.autograd.Function):
    """From ``start`` and the weights to D(v), with the gradient of the fixed point; differentiable once only."""

    @staticmethod
    def forward(ctx: Any, iterations: int, start: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        weights = ChainWeights(*tensors)
        v = iterate(weights, start, start, iterations)
        # The backward pass goes back through D several times: the slopes are computed once.
        first, first_slope = scaled_pila_with_slope(linear(v, weights.first_weight, weights.first_bias))
        inner = torch.cat([v, first], dim=-1)
        second, second_slope = scaled_pila_with_slope(linear(inner, weights.second_weight, weights.second_bias))
        features = torch.cat([inner, second], dim=-1)
        ctx.save_for_backward(
            features, first_slope, second_slope, weights.update_weight, weights.first_weight, weights.second_weight
        )
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Solve :math:`w = (g - w U) D'(v)` for w, the gradient of ``start``, where g is that of D(v)."""
        features, first_slope, second_slope, update, first_weight, second_weight = ctx.saved_tensors
        growth, hidden = first_weight.shape

        def back(through: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """Give the gradients of v and of the layers' values before the activation."""
            second = through[:, hidden + growth :] * second_slope
            through = torch.addmm(through[:, : hidden + growth], second, second_weight)
            first = through[:, hidden:] * first_slope
            return torch.addmm(through[:, :hidden], first, first_weight), first, second

        adjoint, first, second = back(gradient)
        for _ in range(BACKWARD_ITERATIONS):
            adjoint, first, second = back(torch.addmm(gradient, adjoint, update, alpha=-1))
        gradients: dict[str, torch.Tensor] = {}
        if any(ctx.needs_input_grad[2:]):
            gradients = {
                "first_weight": first.mT @ features[:, :hidden],
                "first_bias": first.sum(0),
                "second_weight": second.mT @ features[:, : hidden + growth],
                "second_bias": second.sum(0),
                "update_weight": -adjoint.mT @ features,
            }
        return None, adjoint, *(gradients.get(name) for name in ChainWeights._fields)
