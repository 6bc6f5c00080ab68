# SPDX-License-Identifier: Apache-2.0
"""A chain of units as one equation: the weights that units are folded into, and its fixed point."""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.functional import linear

__all__ = ["ChainWeights", "Units", "fold", "iterate", "normalize", "solve"]

# Between the slopes of Pila for small activations, about 3/4, and for large ones, on average 1/2.
_SLOPE = 0.6

# Of the implicit gradient; each gains about a digit.
BACKWARD_ITERATIONS = 2


def scaled_pila(t: torch.Tensor) -> torch.Tensor:
    r"""Compute :math:`2k\,\mathrm{Pila}(t/k) = t\,(n^2 - 2n + 2)\,e^n` with :math:`n = \min(t, 0)`, for any k.

    The network has the factors k before and 1/(2k) after it in its weights. Pila is smooth and exactly 1-Lipschitz:

    .. math::
        \mathrm{Pila}(x) = x \text{ for } x \ge 0, \qquad
        \left(\tfrac{k^2 x^3}{2} - k x^2 + x\right) e^{kx} \text{ for } x < 0.

    With :math:`t = kx`, its slope for negative x is :math:`(t^3/2 + t^2/2 - t + 1)\,e^t`: between -0.35
    (at t = -4) and 1 (at t = 0), where it meets the slope of the positive side up to the second derivative.

    Reference:
        B. Ahn et al., Invertible Monotone Operators for Normalizing Flows, NeurIPS 2022.
    """
    return t * _pila_parts(t)[-1]


def scaled_pila_with_slope(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute :func:`scaled_pila` and its derivative by ``t``, both of the shape of ``t``."""
    negative, exponential, quotient = _pila_parts(t)
    # The slope of t (t^2 - 2t + 2) e^t is (t^3 + t^2 - 2t + 2) e^t.
    return t * quotient, torch.addcmul(quotient, negative.pow(3), exponential)


def _pila_parts(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute n = min(t, 0), e^n and (n^2 - 2n + 2) e^n; the lower bound keeps n^2 e^n from being infinity times 0."""
    negative = t.clamp(-80, 0)
    exponential = negative.exp()
    return negative, exponential, torch.addcmul(exponential, (negative - 1).square(), exponential)


class Units(NamedTuple):
    r"""Weights of units :math:`G(u) = B\,D(Au + a) + b`, stacked: U units, after any leading dimensions.

    Args:
        encode_weight (torch.Tensor): A, shape (U, hidden_dim, dim).
        encode_bias (torch.Tensor): a, shape (U, hidden_dim).
        first_weight (torch.Tensor): W of the first dense layer of D, shape (U, growth, hidden_dim).
        first_bias (torch.Tensor): Its bias, shape (U, growth).
        second_weight (torch.Tensor): W of the second one, shape (U, growth, hidden_dim + growth).
        second_bias (torch.Tensor): Its bias, shape (U, growth).
        decode_weight (torch.Tensor): B, shape (U, dim, hidden_dim + 2 growth).
        decode_bias (torch.Tensor): b, shape (U, dim).
    """

    encode_weight: torch.Tensor
    encode_bias: torch.Tensor
    first_weight: torch.Tensor
    first_bias: torch.Tensor
    second_weight: torch.Tensor
    second_bias: torch.Tensor
    decode_weight: torch.Tensor
    decode_bias: torch.Tensor


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


def spectral_norm(weight: torch.Tensor) -> torch.Tensor:
    r"""Compute the largest singular value of matrices (..., rows, columns), shape (..., 1, 1), at most 1 % too small.

    With :math:`P = G^{64} / \mathrm{tr}\,G^{64}` for the smaller Gram matrix G, which is nearly the projection onto the
    leading singular vector, it is :math:`\sqrt{\mathrm{tr}(P G)}`, without a state that would have to be kept. P has no
    gradient, as in the derivative of a singular value.
    """
    gram = weight @ weight.mT if weight.shape[-2] <= weight.shape[-1] else weight.mT @ weight
    with torch.no_grad():
        power = _with_unit_trace(gram)
        for _ in range(2):
            power = _with_unit_trace(torch.linalg.matrix_power(power, 8))
    return (power * gram).sum((-2, -1), keepdim=True).clamp(min=1e-30).sqrt()


def _with_unit_trace(matrix: torch.Tensor) -> torch.Tensor:
    return matrix / matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=1e-30)


def normalize(units: Units, eta: torch.Tensor, gain: torch.Tensor, k: float, lipschitz: float) -> Units:
    r"""Make G of free parameters: its Lipschitz constant is below L.

    :math:`G(u) = L\,g\,(B\,D(Au + a) + b)`, where A and B have spectral norm 1, and D consists of two dense layers
    :math:`h(x) = [\eta_1 x,\ \eta_2\,\mathrm{Pila}(Wx + b)]` with :math:`\|W\|_2 = 1` and
    :math:`\eta_1^2 + \eta_2^2 = 1`, and is 1-Lipschitz. The gain g is in (0, 1). All factors are multiplied into the
    weights: what is left of D is that of :class:`ChainWeights`. ``eta`` has shape (2, U, 2), for both layers, and
    ``gain``, the logit of g, (U,).

    Reference:
        Y. Perugachi-Diaz et al., Invertible DenseNets with Concatenated LipSwish, NeurIPS 2021.
    """
    encode, first, second, decode = (
        weight / spectral_norm(weight)
        for weight in (units.encode_weight, units.first_weight, units.second_weight, units.decode_weight)
    )
    eta = functional.normalize(functional.softplus(eta), dim=-1)
    kept, added = eta[..., :1], (eta[..., 1:] / (2 * k)).expand(-1, -1, units.first_bias.shape[-1])
    after_first = torch.cat([kept[0].expand_as(units.encode_bias), added[0]], dim=-1)
    after_second = torch.cat([kept[1] * after_first, added[1]], dim=-1)
    gain = lipschitz * gain.sigmoid()[:, None]
    return units._replace(
        encode_weight=encode,
        first_weight=k * first,
        first_bias=k * units.first_bias,
        second_weight=second * (k * after_first)[:, None],
        second_bias=k * units.second_bias,
        decode_weight=decode * (gain * after_second)[:, None],
        decode_bias=units.decode_bias * gain,
    )


def fold(units: Units, log_scale: torch.Tensor, bias: torch.Tensor, preconditioned: bool = True) -> list[ChainWeights]:
    r"""Join each of C chains of U units into one equation.

    A unit is :math:`f(x) = (\frac{Id + G}{2})^{-1}(x) - x`: with u the solution of :math:`(u + G(u))/2 = x`, that is
    :math:`u = 2x - G(u)`, it gives :math:`f(x) = u - x = x - G(u)` (supplement, Eq. 2 and 3). In the hidden channels
    :math:`v = Au + a` the equation is :math:`v = 2Ax + a - A (B D(v) + b)`.

    The input :math:`x_r` of unit r is linear in the input x of the chain and in the :math:`D_s` of the units s before:
    with the products :math:`c_r` of the scales so far, :math:`x_r = c_r \odot (x + w_r - \sum_{s<r} B_s D_s / c_s)`.
    So the v of all units solve one equation, :math:`v + M D(v) = Cx + c`, with :math:`C_r = 2 A_r c_r` and
    :math:`M_{rs} = A_r c_r B_s / c_s`, twice for s < r, once for s = r, and 0 for s > r.

    ``units`` are in the order of application, with the leading shape (C, U). The maps :math:`x e^s + o` before each
    unit and after the last one, of which the ActNorms are made, have s = ``log_scale`` and o = ``bias`` of shape
    (C, U + 1, dim). Not ``preconditioned``, K is I.
    """
    number, hidden = units.encode_bias.shape[1:]
    widths = [hidden, units.first_bias.shape[-1], units.second_bias.shape[-1]]
    eye = torch.eye(number, dtype=log_scale.dtype, device=log_scale.device)
    # D is ordered by layers: v of all units, then what the first layer of all units adds, and so on.
    first, second = (_block_diagonal(weight, eye, widths) for weight in (units.first_weight, units.second_weight))
    log_scale = log_scale.cumsum(1)
    scale, inverse = log_scale.exp(), (-log_scale[:, :-1]).exp()
    encode = units.encode_weight * scale[:, :-1, None]  # A_r c_r
    decode = units.decode_weight * inverse[..., None]  # B_s / c_s
    decode = torch.cat([part.movedim(1, 2).flatten(2) for part in decode.split(widths, dim=-1)], dim=-1)
    shift = units.decode_bias * inverse
    offset = (bias[:, :-1] * inverse - shift).cumsum(1)  # w of the next unit
    unit = torch.arange(number, device=eye.device)
    row, column = unit.repeat_interleave(hidden), torch.cat([unit.repeat_interleave(width) for width in widths])
    times = (column <= row[:, None]).to(eye) + (column < row[:, None])
    mixing = times * (encode.flatten(1, 2) @ decode)  # M
    start_weight = 2 * encode.flatten(1, 2)  # C
    start_bias = (units.encode_bias + (encode @ (2 * offset + shift)[..., None])[..., 0]).flatten(1)  # c
    if preconditioned:
        # Without a gradient: the fixed point does not depend on K.
        with torch.no_grad():
            identity = torch.eye(mixing.shape[1], dtype=eye.dtype, device=eye.device)
            jacobian = identity.expand(len(mixing), -1, -1)
            for weight in (first, second):
                jacobian = torch.cat([jacobian, 2 * _SLOPE * (weight @ jacobian)], dim=1)  # scaled_pila: twice Pila
            # One by one (docs/upstream.md, "A batched inverse fails on a CPU").
            inverse_k = torch.stack([torch.linalg.inv_ex(one).inverse for one in identity + mixing @ jacobian])
            correction = functional.pad(identity - inverse_k, (0, mixing.shape[2] - mixing.shape[1]))
        mixing = inverse_k @ mixing - correction
        start_weight, start_bias = inverse_k @ start_weight, (inverse_k @ start_bias[..., None])[..., 0]
    stacked = ChainWeights(
        start_weight,
        start_bias,
        first,
        units.first_bias.flatten(1),
        second,
        units.second_bias.flatten(1),
        mixing,
        output_weight=-scale[:, -1, :, None] * decode,
        output_bias=scale[:, -1] * offset[:, -1] + bias[:, -1],
        scale=scale[:, -1],
    )
    return [ChainWeights(*tensors) for tensors in zip(*(tensor.unbind(0) for tensor in stacked), strict=True)]


def _block_diagonal(weight: torch.Tensor, eye: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """Arrange weights (C, U, outputs, inputs) as matrices (C, U outputs, U inputs), inputs ordered by layers."""
    parts = weight.split(widths[:1] if weight.shape[-1] == widths[0] else widths[:2], dim=-1)
    blocks = [(part[..., None, :] * eye[:, None, :, None]).flatten(3).flatten(1, 2) for part in parts]
    return torch.cat(blocks, dim=-1)


def solve(weights: ChainWeights, x: torch.Tensor, iterations: int, dtype: torch.dtype) -> torch.Tensor:
    """Apply a chain of units to (N, dim) by a fixed number of iterations, D in the precision ``dtype``.

    The number never depends on the data, so that ``torch.export`` unrolls it. Where a gradient is needed, the backward
    pass solves the adjoint equation by the same kind of iteration: memory does not grow with the number of iterations.

    Reference:
        S. Bai et al., Deep Equilibrium Models, NeurIPS 2019 (implicit differentiation).
    """
    rounded = ChainWeights(*(tensor.to(dtype) for tensor in weights))
    start = linear(x.to(dtype), rounded.start_weight, rounded.start_bias)
    if start.requires_grad:
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
        gradients = {
            "first_weight": first.mT @ features[:, :hidden],
            "first_bias": first.sum(0),
            "second_weight": second.mT @ features[:, : hidden + growth],
            "second_bias": second.sum(0),
            "update_weight": -adjoint.mT @ features,
        }
        return None, adjoint, *(gradients.get(name) for name in ChainWeights._fields)
