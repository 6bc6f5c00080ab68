# SPDX-License-Identifier: Apache-2.0
"""The Lipschitz-bounded network G of a monotone unit."""

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from anomalib_decad.components.invertible.pila import Pila
from anomalib_decad.ranges import check_range

__all__ = ["DenseLayer", "FusedDenseNet", "LipschitzDenseNet", "dense"]

# One power iteration a training step lags behind the weights at high learning rates, and the estimate is from below.
_POWER_ITERATIONS = 3

# Of G before training.
_GAIN = 0.05


def _normalized_linear(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    spectral_norm(linear, n_power_iterations=_POWER_ITERATIONS)
    return linear


class DenseLayer(nn.Module):
    r"""Concatenates its input with an activated, spectrally normalized linear map of it.

    :math:`h(x) = [\eta_1 x,\ \eta_2\,\mathrm{Pila}(Wx + b)]` with learnable weights
    :math:`\eta_1^2 + \eta_2^2 = 1` and :math:`\|W\|_2 = 1`, hence 1-Lipschitz.

    Args:
        in_features (int): Number of input channels.
        growth (int): Number of channels that are added.
        k (float): Sharpness of :class:`Pila`.

    Reference:
        Y. Perugachi-Diaz et al., Invertible DenseNets with Concatenated LipSwish, NeurIPS 2021.
    """

    def __init__(self, in_features: int, growth: int, k: float = 5.0) -> None:
        super().__init__()
        self.linear = _normalized_linear(in_features, growth)
        self.activation = Pila(k)
        self.concatenation = nn.Parameter(torch.zeros(2))

    def eta(self) -> torch.Tensor:
        """Compute the two weights of the concatenation, shape (2,), of norm 1."""
        return _eta(self.concatenation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., in_features + growth)."""
        eta = self.eta()
        return torch.cat([eta[0] * x, eta[1] * self.activation(self.linear(x))], dim=-1)


def _eta(concatenation: torch.Tensor) -> torch.Tensor:
    return functional.normalize(functional.softplus(concatenation), dim=0)


class LipschitzDenseNet(nn.Module):
    r"""i-DenseNet between two spectrally normalized linear maps: :math:`G(u) = L\,g\,(B\,D(Au + a) + b)`.

    A (dim to hidden_dim) and B (back to dim) have spectral norm 1, D, a stack of :class:`DenseLayer`, is 1-Lipschitz,
    and the learned gain g lies in (0, 1), so the Lipschitz constant of G is at most L. The gain starts at 0.05: a unit
    starts near the identity, and the latent near the axes of the embedding. As hidden_dim is small, the fixed point of
    a unit can be iterated in hidden_dim channels (see :class:`MonotoneUnit`), which is what makes the invertible
    network cheap.

    Args:
        dim (int): Number of channels of the input and the output.
        hidden_dim (int): Number of channels after A.
        growth (int): Channels that each dense layer adds.
        depth (int): Number of dense layers; at least 1.
        lipschitz (float): The bound L, in (0, 1).
        k (float): Sharpness of :class:`Pila`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int = 64,
        growth: int = 32,
        depth: int = 2,
        lipschitz: float = 0.9,
        k: float = 5.0,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("hidden_dim", hidden_dim), ("growth", growth), ("depth", depth)):
            check_range(value >= 1, name, "at least 1", value)
        check_range(0 < lipschitz < 1, "lipschitz", "between 0 and 1 (both excluded)", lipschitz)
        self.lipschitz = lipschitz
        self.k = k
        self.encode = _normalized_linear(dim, hidden_dim)
        self.dense = nn.Sequential(*(DenseLayer(hidden_dim + i * growth, growth, k) for i in range(depth)))
        self.decode = _normalized_linear(hidden_dim + depth * growth, dim)
        self.gain = nn.Parameter(torch.tensor(_GAIN).logit())

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Compute G.

        Args:
            u (torch.Tensor): Shape (..., dim).

        Returns:
            torch.Tensor: Shape (..., dim).
        """
        return self.lipschitz * self.gain.sigmoid() * self.decode(self.dense(self.encode(u)))

    def tensors(self) -> list[torch.Tensor]:
        """Give what :meth:`FusedDenseNet.from_tensors` takes."""
        tensors = [self.encode.weight, self.encode.bias, self.decode.weight, self.decode.bias, self.gain]
        for layer in cast("Iterable[DenseLayer]", self.dense):
            tensors += [layer.linear.weight, layer.linear.bias, layer.concatenation]
        return tensors

    def fused(self) -> "FusedDenseNet":
        """Compute all normalized weights once, for many evaluations of D.

        Returns:
            FusedDenseNet: A, a, B, b and D of the class's formula.
        """
        return FusedDenseNet.from_tensors(self.k, *self.tensors())


class FusedDenseNet(NamedTuple):
    """A :class:`LipschitzDenseNet` with plain weights, into which all factors around the activations are multiplied.

    Args:
        encode_weight (torch.Tensor): A, shape (hidden_dim, dim).
        encode_bias (torch.Tensor): a, shape (hidden_dim,).
        decode_weight (torch.Tensor): B, shape (dim, hidden_dim + depth * growth).
        decode_bias (torch.Tensor): b, shape (dim,).
        layers (list[tuple[torch.Tensor, torch.Tensor]]): Weight and bias of each dense layer.
    """

    encode_weight: torch.Tensor
    encode_bias: torch.Tensor
    decode_weight: torch.Tensor
    decode_bias: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def from_tensors(
        cls,
        k: float,
        encode_weight: torch.Tensor,
        encode_bias: torch.Tensor,
        decode_weight: torch.Tensor,
        decode_bias: torch.Tensor,
        gain: torch.Tensor,
        *dense_layers: torch.Tensor,
    ) -> "FusedDenseNet":
        """Multiply the factors of Pila and of the concatenations into the weights.

        Args:
            k (float): Sharpness of :class:`Pila`.
            encode_weight (torch.Tensor): As :class:`LipschitzDenseNet` has it, like all others.
            encode_bias (torch.Tensor): Its bias.
            decode_weight (torch.Tensor): Shape (dim, hidden_dim + depth * growth).
            decode_bias (torch.Tensor): Its bias.
            gain (torch.Tensor): The logit of g.
            *dense_layers (torch.Tensor): Weight, bias and concatenation of each dense layer.

        Returns:
            FusedDenseNet: The weights.
        """
        scale = torch.ones_like(encode_bias)
        layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for weight, bias, concatenation in zip(*(dense_layers[part::3] for part in range(3)), strict=True):
            layers.append((k * weight * scale, k * bias))
            first, second = _eta(concatenation).unbind(-1)
            scale = torch.cat([first * scale, (second / (2 * k)).expand(bias.shape)])
        gain = gain.sigmoid()
        return cls(encode_weight, encode_bias, gain * decode_weight * scale, gain * decode_bias, layers)

    def linearized(self, slope: float) -> torch.Tensor:
        """Compute the Jacobian of D if Pila had the same slope everywhere.

        Args:
            slope (float): The slope, in [0, 1].

        Returns:
            torch.Tensor: Shape (hidden_dim + depth * growth, hidden_dim).
        """
        jacobian = torch.eye(len(self.encode_weight), dtype=self.encode_weight.dtype, device=self.encode_weight.device)
        for weight, _ in self.layers:
            # Pila.scaled has twice the slope.
            jacobian = torch.cat([jacobian, 2 * slope * (weight @ jacobian)])
        return jacobian


def dense(v: torch.Tensor, layers: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Compute D of a :class:`FusedDenseNet` but for the factors that are in B.

    Args:
        v (torch.Tensor): Shape (..., hidden_dim).
        layers (Iterable[tuple[torch.Tensor, torch.Tensor]]): Weight and bias of each dense layer.

    Returns:
        torch.Tensor: Shape (..., hidden_dim + depth * growth); begins with ``v``.
    """
    for weight, bias in layers:
        v = torch.cat([v, Pila.scaled(functional.linear(v, weight, bias))], dim=-1)
    return v
