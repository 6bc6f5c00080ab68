# SPDX-License-Identifier: Apache-2.0
"""The fixed point of a monotone unit, with its implicit gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from anomalib_decad.components.invertible.dense_net import dense
from anomalib_decad.components.invertible.pila import Pila

__all__ = ["fixed_point", "iterate"]


def fixed_point(
    start: torch.Tensor,
    update_weight: torch.Tensor,
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    num_iterations: int,
    num_backward_iterations: int | None = None,
) -> torch.Tensor:
    r"""Solve :math:`v = s - D(v) U^T` by a fixed number of iterations, for a contraction.

    The number of iterations never depends on the data, so that ``torch.export`` unrolls it. Where a gradient is needed,
    the backward pass solves :math:`w = (\nabla_D - w U) D'(v)` by the same kind of iteration, and w is the gradient of
    s: memory does not grow with the number of iterations.

    Args:
        start (torch.Tensor): s, which is also the first guess, shape (N, hidden_dim).
        update_weight (torch.Tensor): U, shape (hidden_dim, width of D).
        layers (Sequence[tuple[torch.Tensor, torch.Tensor]]): Weight and bias of each dense layer of D.
        num_iterations (int): Iterations before the last one; the error shrinks by the Lipschitz constant with each.
        num_backward_iterations (int | None): Iterations of the backward solve.
            Defaults to ``None``: as many as ``num_iterations``.

    Returns:
        torch.Tensor: D(v), shape (N, width of D), whose first channels are v.

    Reference:
        S. Bai et al., Deep Equilibrium Models, NeurIPS 2019 (implicit differentiation).
    """
    backward_iterations = num_iterations if num_backward_iterations is None else num_backward_iterations
    if torch.is_grad_enabled():
        parameters = (parameter for layer in layers for parameter in layer)
        return _FixedPoint.apply(start, update_weight, num_iterations, backward_iterations, *parameters)
    return dense(_iterate_from(start, update_weight, layers, num_iterations), layers)


def iterate(
    v: torch.Tensor,
    start: torch.Tensor,
    update_weight: torch.Tensor,
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Iterate :func:`fixed_point` once, from ``v`` of shape (N, hidden_dim); the other arguments are those of it."""
    return torch.addmm(start, dense(v, layers), update_weight.mT, alpha=-1)


def _iterate_from(
    start: torch.Tensor,
    update_weight: torch.Tensor,
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    num_iterations: int,
) -> torch.Tensor:
    v = start
    for _ in range(num_iterations + 1):
        v = iterate(v, start, update_weight, layers)
    return v


class _FixedPoint(torch.autograd.Function):
    """:func:`fixed_point` with its gradient; it can be differentiated once only."""

    @staticmethod
    def forward(
        ctx: Any,
        start: torch.Tensor,
        update_weight: torch.Tensor,
        num_iterations: int,
        num_backward_iterations: int,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        weights, biases = parameters[::2], parameters[1::2]
        features = _iterate_from(start, update_weight, list(zip(weights, biases, strict=True)), num_iterations)
        # The backward pass goes back through D several times: the slopes are computed once.
        slopes = []
        for weight, bias in zip(weights, biases, strict=True):
            value, slope = Pila.scaled_with_slope(functional.linear(features, weight, bias))
            features = torch.cat([features, value], dim=-1)
            slopes.append(slope)
        ctx.save_for_backward(features, update_weight, *weights, *slopes)
        ctx.num_backward_iterations = num_backward_iterations
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features, update_weight, *others = ctx.saved_tensors
        depth = len(others) // 2
        weights, slopes = others[:depth], others[depth:]

        def back(through: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
            """Give the gradients of v and of each layer's values before activation."""
            inner: list[torch.Tensor] = []
            for weight, slope in zip(reversed(weights), reversed(slopes), strict=True):
                through, last = through.split([weight.shape[1], weight.shape[0]], dim=-1)
                inner.insert(0, last * slope)
                through = torch.addmm(through, inner[0], weight)
            return through, inner

        adjoint, inner = back(gradient)
        for _ in range(ctx.num_backward_iterations):
            adjoint, inner = back(torch.addmm(gradient, adjoint, update_weight, alpha=-1))
        if not any(ctx.needs_input_grad[1:]):
            return adjoint, *(None for _ in ctx.needs_input_grad[1:])
        parameters: list[torch.Tensor] = []
        for weight, values in zip(weights, inner, strict=True):
            parameters += [values.mT @ features[:, : weight.shape[1]], values.sum(0)]
        return adjoint, -adjoint.mT @ features, None, None, *parameters
