# SPDX-License-Identifier: Apache-2.0
r"""Selective scan: the recurrence of a state space whose matrices depend on the input.

.. math:: h_t = \exp(\Delta_t A)\, h_{t-1} + \Delta_t B_t x_t, \qquad y_t = C_t \cdot h_t + D x_t

It is computed by the CUDA kernels of the package ``mamba_ssm`` where that is installed and the tensors are on a GPU,
else by a loop in plain PyTorch, and in exported graphs, which have no loops, by doubling the span of a step.

Reference:
    Gu and Dao: Mamba: Linear-Time Sequence Modeling with Selective State Spaces. 2023.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import functional

from anomalib_decad.components.whitening import at_least_float32

__all__ = ["selective_scan"]

# Steps whose states are computed, and kept, at a time.
_SEGMENT = 16

_HAS_KERNEL = find_spec("mamba_ssm") is not None


def selective_scan(
    x: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> torch.Tensor:
    """Scan sequences, in float32 and in several independent groups of channels.

    Args:
        x (torch.Tensor): Input of shape (B, groups, dim, L).
        delta (torch.Tensor): Step sizes, not negative, shape (B, groups, dim, L).
        a (torch.Tensor): Matrix A, negative, shape (groups, dim, states).
        b (torch.Tensor): Matrices B, shape (B, groups, states, L).
        c (torch.Tensor): Matrices C, shape (B, groups, states, L).
        d (torch.Tensor): Factors D, shape (groups, dim).

    Returns:
        torch.Tensor: Output of shape (B, groups, dim, L).
    """
    with torch.autocast(x.device.type, enabled=False):
        x, delta, a, b, c, d = (at_least_float32(tensor) for tensor in (x, delta, a, b, c, d))
        if x.is_cuda and _HAS_KERNEL:
            return _kernel(x, delta, a, b, c, d)
        is_exported = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return (_doubling if is_exported else _Scan.apply)(x, delta, a, b, c) + d[..., None] * x


def _kernel(
    x: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> torch.Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    y = selective_scan_fn(x.flatten(1, 2), delta.flatten(1, 2), a.flatten(0, 1), b, c, d.flatten())
    return y.view_as(x)


def _doubling(x: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Compute all states at once in log2(L) passes, each of which joins spans twice as long."""
    length = x.shape[-1]
    decay = (delta[..., None, :] * a[..., None]).exp()
    state = (delta * x)[..., None, :] * b[:, :, None]
    span = 1
    while span < length:
        state = state + decay * functional.pad(state, (span, 0))[..., :length]
        decay = decay * functional.pad(decay, (span, 0), value=1.0)[..., :length]
        span *= 2
    return (state * c[:, :, None]).sum(-2)


class _Scan(torch.autograd.Function):
    """The recurrence as a loop over the steps, which keeps a state of each segment; inside, time comes first."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
    ) -> torch.Tensor:
        x, delta, b, c = (tensor.movedim(-1, 0).contiguous() for tensor in (x, delta, b, c))
        state = x.new_zeros(*x.shape[1:], a.shape[-1])
        y = torch.empty_like(x)
        starts = []
        for start in range(0, len(x), _SEGMENT):
            part = slice(start, start + _SEGMENT)
            starts.append(state)
            _, states = _states(x[part], delta[part], a, b[part], state)
            state = states[-1].clone()
            y[part] = (states * c[part].unsqueeze(-2)).sum(-1)
        ctx.save_for_backward(x, delta, a, b, c, torch.stack(starts))
        return y.movedim(0, -1)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, delta, a, b, c, starts = ctx.saved_tensors
        grad_y = grad_y.movedim(-1, 0).contiguous()
        grad_x, grad_delta, grad_b, grad_c = (torch.empty_like(tensor) for tensor in (x, delta, b, c))
        grad_a = torch.zeros_like(a)
        carry = torch.zeros_like(starts[0])
        for index in reversed(range(len(starts))):
            part = slice(index * _SEGMENT, (index + 1) * _SEGMENT)
            decay, states = _states(x[part], delta[part], a, b[part], starts[index])
            # Gradients of the states, from the last step to the first.
            grads = grad_y[part].unsqueeze(-1) * c[part].unsqueeze(-2)
            for step in reversed(range(len(grads))):
                grads[step] += carry
                carry = decay[step] * grads[step]
            grad_c[part] = (grad_y[part].unsqueeze(-1) * states).sum(-2)
            grad_b[part] = (grads * (delta[part] * x[part]).unsqueeze(-1)).sum(-2)
            grad_input = (grads * b[part].unsqueeze(-2)).sum(-1)
            before = torch.cat([starts[index][None], states[:-1]])
            grad_exponent = grads * before * decay
            grad_x[part] = grad_input * delta[part]
            grad_delta[part] = grad_input * x[part] + (grad_exponent * a).sum(-1)
            grad_a += (grad_exponent * delta[part].unsqueeze(-1)).sum((0, 1))
        grad_x, grad_delta, grad_b, grad_c = (tensor.movedim(0, -1) for tensor in (grad_x, grad_delta, grad_b, grad_c))
        return grad_x, grad_delta, grad_a, grad_b, grad_c


def _states(
    x: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute decays and states of some steps, both of shape (steps, B, groups, dim, states)."""
    decay = (delta.unsqueeze(-1) * a).exp_()
    states = (delta * x).unsqueeze(-1) * b.unsqueeze(-2)
    for step in range(len(x)):
        state = states[step].addcmul_(decay[step], state)
    return decay, states
