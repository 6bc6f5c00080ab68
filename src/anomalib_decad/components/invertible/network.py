# SPDX-License-Identifier: Apache-2.0
"""The invertible network F of DecAD."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from anomalib_decad.components.invertible.chain import ChainWeights, Units, fold, iterate, normalize, solve
from anomalib_decad.components.options import InvertibleOptions

__all__ = ["FrozenNetwork", "InvertibleNetwork", "NetworkWeights"]

# Channels that each dense layer adds.
_GROWTH = 32

# Of G before training: a unit starts near the identity, and the latent near the axes of the embedding.
_GAIN = 0.05

# Units that are solved as one, the first of these that their number can be divided by: more need fewer operations, and
# more multiply-adds (benchmarks/NOTES.md, "Units that are solved together").
_TOGETHER = (3, 4, 2, 1)

# Deviations of a channel, relative to the median channel's and to the largest, below which it is not scaled to 1.
_OF_MEDIAN, _OF_LARGEST = 0.5, 0.01

# Iterations in training mode; each gains about a digit.
_TRAINING_ITERATIONS = 3

# Relative change of the last iteration in eval mode: the round trip of a whole network is then within 1e-4.
_TOLERANCE, _MAX_ITERATIONS = 1e-4, 64

# Standard deviations of the random latents that convergence is tried on.
_PROBES = (0.1, 1.0, 10.0)


class NetworkWeights(NamedTuple):
    """Folded weights of both directions: chains of units in the order of application, and iterations of the solver."""

    forward: tuple[ChainWeights, ...]
    inverse: tuple[ChainWeights, ...]
    iterations: int = _TRAINING_ITERATIONS


class _FoldedNetwork(nn.Module):
    """Both directions of the network, by folded weights."""

    is_learned = False  # whether its parameters are trained

    def weights(self) -> NetworkWeights:
        """Give the folded weights of both directions."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, weights: NetworkWeights | None = None) -> torch.Tensor:
        """Map embeddings of shape (..., dim) to latents of the same shape, by what :meth:`weights` gave, or gives."""
        weights = weights or self.weights()
        return self._run(weights.forward, x, weights.iterations)

    def inverse(self, z: torch.Tensor, weights: NetworkWeights | None = None) -> torch.Tensor:
        """Map latents of shape (..., dim) back to embeddings; ``weights`` as in :meth:`forward`."""
        weights = weights or self.weights()
        return self._run(weights.inverse, z, weights.iterations)

    def _run(self, chains: Sequence[ChainWeights], x: torch.Tensor, iterations: int) -> torch.Tensor:
        device = x.device.type
        is_bfloat16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        rows = x.reshape(-1, x.shape[-1]).to(chains[0].scale.dtype)
        dtype = torch.bfloat16 if is_bfloat16 and self.training and self.is_learned else rows.dtype
        with torch.autocast(device, enabled=False):
            for chain in chains:
                rows = solve(chain, rows, iterations, dtype)
        return rows.reshape(x.shape)


class InvertibleNetwork(_FoldedNetwork):
    r"""Invertible map of each patch embedding to the latent space, :math:`F = F_R \circ \dots \circ F_1`.

    Each block :math:`F_r = f_K \circ \dots \circ f_1` is a chain of units :math:`f(x) = (\frac{Id + G}{2})^{-1}(x) - x`
    and an ActNorm, a scale and bias of each channel, :math:`y = e^s x + o` (supplement, Eq. 1 to 3). What G is says
    :func:`normalize`, and how units are solved :func:`fold`.

    Computed in float32, also under automatic mixed precision: in half precision the inverse would not be one.
    Only G is computed in bfloat16, in training mode under automatic mixed precision with it: inputs bypass G, so what
    is rounded is the change that a unit makes.

    An ActNorm starts from the statistics of normal embeddings. It stretches no channel by more than twice what the
    median channel is stretched by: a channel that hardly varies holds rounding error, and what units learn to put into
    it would be stretched with it, without an end (``benchmarks/NOTES.md``, "Energy").

    Args:
        dim (int): Number of channels of an embedding.
        options (InvertibleOptions): Its shape.

    Example:
        >>> network = InvertibleNetwork(dim=32).eval()
        >>> x = torch.randn(4, 100, 32)
        >>> torch.allclose(network.inverse(network(x)), x, atol=1e-4)
        True

    Reference:
        DecAD, ICCV 2025, supplement: R = 3, K = 2. D. P. Kingma and P. Dhariwal, Glow, NeurIPS 2018 (ActNorm).
    """

    initialized: torch.Tensor

    def __init__(self, dim: int, options: InvertibleOptions = InvertibleOptions()) -> None:
        super().__init__()
        self.dim, self.options = dim, options
        number, hidden = options.num_blocks * options.num_units, options.hidden_dim
        encode, decode = _linear(number, dim, hidden), _linear(number, hidden + 2 * _GROWTH, dim)
        first, second = (_linear(number, inputs, _GROWTH) for inputs in (hidden, hidden + _GROWTH))
        self.units = nn.ParameterDict(Units(*encode, *first, *second, *decode)._asdict())
        self.eta = nn.Parameter(torch.zeros(2, number, 2))
        self.gain = nn.Parameter(torch.full((number,), _GAIN).logit())
        self.norm_scale = nn.Parameter(torch.zeros(options.num_blocks, dim))
        self.norm_bias = nn.Parameter(torch.zeros(options.num_blocks, dim))
        self.register_buffer("initialized", torch.tensor(False))
        # The same as a Python value: reading the buffer would make a device wait.
        self.is_initialized = False
        # What :meth:`weights` gave last, and the state of the parameters that it is of.
        self._folded: tuple[NetworkWeights, Any] | None = None
        self.register_load_state_dict_post_hook(InvertibleNetwork._on_state_dict)

    @staticmethod
    def _on_state_dict(module: "InvertibleNetwork", incompatible_keys: object) -> None:
        del incompatible_keys
        module.is_initialized = bool(module.initialized)

    def fold(self, converged: bool) -> NetworkWeights:
        """Fold the weights of both directions, for all passes until they change, with their gradients.

        The solver gets three iterations, for training; ``converged``, as many, at most 64, as bring the last change of
        every random latent below 1e-4 of it, which follows from the weights alone.
        """
        with torch.autocast(self.norm_scale.device.type, enabled=False):
            units = self._normalized()
            weights = self._fold(units)
            if converged:
                needed = _needed_iterations(weights)
                if needed == _MAX_ITERATIONS:
                    # Close to the Lipschitz bound, where the plain iteration still converges.
                    weights = self._fold(units, preconditioned=False)
                    needed = _needed_iterations(weights)
                weights = weights._replace(iterations=needed)
            return weights

    def _normalized(self) -> Units:
        return normalize(Units(**self.units), self.eta, self.gain, self.options.pila_k, self.options.lipschitz)

    def _fold(self, units: Units, preconditioned: bool = True) -> NetworkWeights:
        number = len(units.encode_bias)
        count = next(count for count in _TOGETHER if number % count == 0)
        # The inverse of a unit with G is the one with -G, and units are undone in reverse.
        order = torch.arange(number, device=units.encode_bias.device)
        order = torch.stack([order, order.flip(0)])
        both = Units(*(tensor[order] for tensor in units))
        sign = torch.tensor([1.0, -1.0], device=order.device)[:, None, None]
        both = both._replace(decode_weight=both.decode_weight * sign[..., None], decode_bias=both.decode_bias * sign)
        # The ActNorm of a block comes after its last unit, and is undone before it.
        scale, bias = (norm.new_zeros(number + 1, self.dim) for norm in (self.norm_scale, self.norm_bias))
        ends = slice(self.options.num_units, None, self.options.num_units)
        scale[ends], bias[ends] = self.norm_scale, self.norm_bias
        scale, bias = torch.stack([scale, -scale.flip(0)]), torch.stack([bias, (-bias * (-scale).exp()).flip(0)])

        def affine(values: torch.Tensor) -> torch.Tensor:
            """Give what comes before each unit of each chain, and after the last chain."""
            before = values[:, :-1].unflatten(1, (-1, count))
            after = functional.pad(values[:, None, -1:], (0, 0, 0, 0, before.shape[1] - 1, 0))
            return torch.cat([before, after], dim=2).flatten(0, 1)

        of_chains = Units(*(tensor.unflatten(1, (-1, count)).flatten(0, 1) for tensor in both))
        chains = fold(of_chains, affine(scale), affine(bias), preconditioned)
        half = len(chains) // 2
        return NetworkWeights(tuple(chains[:half]), tuple(chains[half:]))

    def weights(self) -> NetworkWeights:
        """Give folded weights. Unless they are learned, they are kept as long as the parameters are what they were."""
        if self.is_learned and (self.training or torch.is_grad_enabled()):
            return self.fold(converged=not self.training)
        # Tensors of inference mode have no version.
        state = [(p.data_ptr(), None if p.is_inference() else p._version) for p in self.parameters()]
        if self._folded is None or self._folded[1] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._folded = self.fold(converged=True), state
        return self._folded[0]

    @property
    def is_learned(self) -> bool:  # type: ignore[override]
        """Whether its parameters are trained."""
        return self.gain.requires_grad

    @torch.no_grad()
    def initialize(self, x: torch.Tensor) -> None:
        """Initialize the ActNorms from normal embeddings (..., dim), unless they have been."""
        if self.is_initialized:
            return
        x, number = x.reshape(-1, self.dim).to(self.norm_bias.dtype), self.options.num_units
        nothing = self.norm_bias.new_zeros(1, number + 1, self.dim)
        with torch.autocast(x.device.type, enabled=False):
            units = self._normalized()
            for block in range(self.options.num_blocks):
                part = (tensor[None, block * number : (block + 1) * number] for tensor in units)
                (chain,) = fold(Units(*part), nothing, nothing)
                x = solve(chain, x, _TRAINING_ITERATIONS, x.dtype)
                mean, std = _statistics(x)
                self.norm_scale[block], self.norm_bias[block] = -std.log(), -mean / std
                x = (x - mean) / std
        self.initialized.fill_(True)
        self.is_initialized = True


class FrozenNetwork(_FoldedNetwork):
    """An :class:`InvertibleNetwork` for export: its folded weights as buffers, which no gradient reaches."""

    def __init__(self, weights: NetworkWeights) -> None:
        super().__init__()
        self.iterations, self.count = weights.iterations, len(weights.forward)
        for direction in ("forward", "inverse"):
            for index, chain in enumerate(getattr(weights, direction)):
                for name, tensor in chain._asdict().items():
                    self.register_buffer(f"{direction}_{index}_{name}", tensor.detach().clone())

    def weights(self) -> NetworkWeights:
        """Give the folded weights."""
        return NetworkWeights(self._chains("forward"), self._chains("inverse"), self.iterations)

    def _chains(self, direction: str) -> tuple[ChainWeights, ...]:
        prefixes = [f"{direction}_{index}_" for index in range(self.count)]
        return tuple(ChainWeights(*(self.get_buffer(p + name) for name in ChainWeights._fields)) for p in prefixes)


def _linear(number: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw weights (number, outputs, inputs) and biases (number, outputs) as torch's linear layers do."""
    bound = 1 / math.sqrt(inputs)
    shapes = (number, outputs, inputs), (number, outputs)
    weight, bias = (torch.empty(shape).uniform_(-bound, bound) for shape in shapes)
    return weight, bias


def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute mean and bounded deviation of each channel over the rows."""
    mean = x.mean(0)
    std = (x.square().mean(0) - mean.square()).clamp(min=0).sqrt()
    std = std.clamp(min=max(_OF_MEDIAN * std.median().item(), _OF_LARGEST * std.max().item()))
    return mean, torch.where(std > 1e-6, std, torch.ones_like(std))


@torch.no_grad()
def _needed_iterations(weights: NetworkWeights) -> int:
    largest = 1
    for chain in (*weights.forward, *weights.inverse):
        # Numbers of a generator of its own: neither the user's nor the training's are used up.
        noise = torch.randn(64, len(chain.start_bias), generator=torch.Generator().manual_seed(0))
        start = torch.cat([scale * noise for scale in _PROBES]).to(chain.start_bias)
        v, count, change = start, 0, 1.0
        while change > _TOLERANCE and count < _MAX_ITERATIONS:  # a NaN ends it
            update = iterate(chain, start, v, 1)
            change, v = ((update - v).norm(dim=-1) / update.norm(dim=-1)).max().item(), update
            count += 1
        largest = max(largest, count if change <= _TOLERANCE else _MAX_ITERATIONS)
    return largest
