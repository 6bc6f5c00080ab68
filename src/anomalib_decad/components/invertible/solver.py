# SPDX-License-Identifier: Apache-2.0
"""Fixed points of contractions, with implicit gradients."""

from collections.abc import Callable

import torch

__all__ = ["fixed_point"]


def fixed_point(
    function: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    num_iterations: int,
    num_backward_iterations: int | None = None,
) -> torch.Tensor:
    """Solve ``v = function(v)`` for a contraction by a fixed number of iterations.

    The number of iterations never depends on the data, so that ``torch.export`` unrolls it. Where a gradient is
    needed, only the last application of ``function`` enters the graph, and its backward pass solves
    ``w = grad + J^T w`` (J the Jacobian of ``function`` at the fixed point) by the same kind of iteration: memory does
    not grow with the number of iterations.

    Args:
        function (Callable): Contraction that maps a tensor to one of the same shape. Each call must compute the same.
        start (torch.Tensor): First guess.
        num_iterations (int): Applications of ``function`` before the last one; the error shrinks by its Lipschitz
            constant with each.
        num_backward_iterations (int | None): Iterations of the backward solve.
            Defaults to ``None``: as many as ``num_iterations``.

    Returns:
        torch.Tensor: The fixed point, same shape as ``start``.

    Reference:
        S. Bai et al., Deep Equilibrium Models, NeurIPS 2019 (implicit differentiation).
    """
    needs_grad = torch.is_grad_enabled()
    with torch.no_grad():
        solution = start.detach()
        for _ in range(num_iterations):
            solution = function(solution)
    if not needs_grad:
        return function(solution)

    backward_iterations = num_iterations if num_backward_iterations is None else num_backward_iterations
    last = solution.requires_grad_()
    with torch.enable_grad():
        applied = function(last)
    # The graph behind `applied` serves twice: as J^T in the hook below, and as the gradient of the parameters. The
    # identity keeps the hook's solve, which goes through `applied`, apart from the gradient that it replaces.
    result = applied.view_as(applied)
    if result.requires_grad:

        def solve_adjoint(grad: torch.Tensor | None) -> torch.Tensor | None:
            if grad is None:  # autograd's way to say zero
                return None
            adjoint = grad
            for _ in range(backward_iterations):
                (product,) = torch.autograd.grad(applied, last, adjoint, retain_graph=True)
                adjoint = grad + product
            return adjoint

        result.register_hook(solve_adjoint)
    return result
