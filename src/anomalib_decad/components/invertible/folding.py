# SPDX-License-Identifier: Apache-2.0
"""From the parameters of units to the weights that the solver iterates with."""

from typing import NamedTuple

import torch
from torch.nn import functional

from anomalib_decad.components.invertible.solver import ChainWeights

__all__ = ["Units", "fold", "normalize", "spectral_norm"]

# Between the slopes of Pila for small activations, about 3/4, and for large ones, on average 1/2.
_SLOPE = 0.6


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


def spectral_norm(weight: torch.Tensor) -> torch.Tensor:
    r"""Compute the largest singular value of matrices, without a state that would have to be kept.

    With :math:`P = G^{64} / \mathrm{tr}\,G^{64}` for the smaller Gram matrix G, which is nearly the projection onto the
    leading singular vector, it is :math:`\sqrt{\mathrm{tr}(P G)}`. P has no gradient, as in the derivative of a
    singular value.

    Args:
        weight (torch.Tensor): Shape (..., rows, columns).

    Returns:
        torch.Tensor: Shape (..., 1, 1), at most 1 % too small.
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
    weights: what is left of D is that of :class:`ChainWeights`.

    Args:
        units (Units): Parameters of the layers.
        eta (torch.Tensor): Parameters of both etas, shape (2, U, 2).
        gain (torch.Tensor): The logit of g, shape (U,).
        k (float): Sharpness of Pila.
        lipschitz (float): L.

    Returns:
        Units: The weights.

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

    Args:
        units (Units): Weights in the order of application, with the leading shape (C, U).
        log_scale (torch.Tensor): s of the maps :math:`x e^s + o` before each unit and after the last one, of which the
            ActNorms are made, shape (C, U + 1, dim).
        bias (torch.Tensor): o, shape (C, U + 1, dim).
        preconditioned (bool): Whether to use K, see :class:`ChainWeights`. Defaults to ``True``.

    Returns:
        list[ChainWeights]: The weights of each chain.
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
            # One by one: on a CPU a batch of them can fail for want of threads (docs/upstream.md).
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
