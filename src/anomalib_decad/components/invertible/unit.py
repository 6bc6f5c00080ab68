# SPDX-License-Identifier: Apache-2.0
"""The invertible unit of DecAD's network."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from FrEIA.modules import InvertibleModule
from torch.nn import functional

from anomalib_decad.components.invertible.dense_net import FoldedDenseNet, LipschitzDenseNet
from anomalib_decad.components.solver import fixed_point

__all__ = ["MonotoneUnit", "SolverIterations"]


# Relative change of the last iteration in eval mode; the round trip of a whole network is then within 1e-4.
_TOLERANCE = 2e-6
_MAX_ITERATIONS = 64
# Standard deviations of the random latents that convergence is tried on.
_PROBES = (0.1, 1.0, 10.0)


class SolverIterations(NamedTuple):
    """How many iterations the fixed points of a unit get.

    Args:
        evaluation (int | None): In eval mode and in exported graphs, where the inverse must be accurate.
            Defaults to ``None``: as many as bring the change of every random latent below 2e-6 of it, at most 64.
            That number follows from the weights alone, when the unit is put into eval mode. Measured on a network that
            was trained for 1,000 steps on DINOv2 ViT-S/14 features, whose bound of the contraction is 0.66: the
            relative error of the round trip is 3e-3 with 2 iterations, 2e-5 with 6, 2e-6 with 8 and, at the precision
            of float32, 5e-7 with 12.
        training (int): In training mode.
        backward (int): For the implicit gradient.
    """

    evaluation: int | None = None
    training: int = 8
    backward: int = 8


DEFAULT_ITERATIONS = SolverIterations()


class MonotoneUnit(InvertibleModule):
    r"""Inverts a monotone operator: :math:`f(x) = (\frac{Id + G}{2})^{-1}(x) - x`.

    With u the solution of :math:`(u + G(u))/2 = x`, :math:`f(x) = u - x`. As G has a Lipschitz constant below 1, u is
    the fixed point of the contraction :math:`u = 2x - G(u)`, and the inverse of :math:`f_G` is :math:`f_{-G}`, which
    costs the same.

    G is :math:`L\,(B\,D(Au + a) + b)` (:class:`LipschitzDenseNet`), so the fixed point is iterated for
    :math:`v = Au + a`, which has hidden_dim channels instead of dim:
    :math:`v = 2Ax + a - L\,A\,(B\,D(v) + b)`, and then :math:`u = 2x - L\,(B\,D(v) + b)`.

    Args:
        dims_in (Iterable[tuple[int]]): ``[(dim,)]``, as FrEIA passes it.
        dims_c (Iterable[tuple[int]] | None): Must be empty: the unit takes no condition.
        hidden_dim (int): See :class:`LipschitzDenseNet`.
        growth (int): See :class:`LipschitzDenseNet`.
        depth (int): See :class:`LipschitzDenseNet`.
        lipschitz (float): See :class:`LipschitzDenseNet`.
        k (float): See :class:`LipschitzDenseNet`.
        iterations (SolverIterations): Number of solver iterations.

    Reference:
        B. Ahn et al., Invertible Monotone Operators for Normalizing Flows, NeurIPS 2022, Eq. 3.
    """

    def __init__(
        self,
        dims_in: Iterable[tuple[int]],
        dims_c: Iterable[tuple[int]] | None = None,
        *,
        hidden_dim: int = 64,
        growth: int = 32,
        depth: int = 2,
        lipschitz: float = 0.9,
        k: float = 5.0,
        iterations: SolverIterations = DEFAULT_ITERATIONS,
    ) -> None:
        super().__init__(dims_in, dims_c)
        if self.dims_c:
            msg = "MonotoneUnit takes no condition"
            raise ValueError(msg)
        ((dim,),) = self.dims_in
        self.net = LipschitzDenseNet(dim, hidden_dim, growth, depth, lipschitz, k)
        self.iterations = iterations
        self._evaluation_iterations = _MAX_ITERATIONS
        self.register_load_state_dict_post_hook(MonotoneUnit._on_state_dict)

    def train(self, mode: bool = True) -> "MonotoneUnit":
        """Switch between training and eval mode; the latter fixes the number of solver iterations.

        Args:
            mode (bool): Whether to switch to training mode.

        Returns:
            MonotoneUnit: The unit.
        """
        super().train(mode)
        if not mode:
            self._fix_iterations()
        return self

    @torch.no_grad()
    def _fix_iterations(self) -> None:
        if self.iterations.evaluation is not None:
            self._evaluation_iterations = self.iterations.evaluation
            return
        net = self.net.folded()
        mixing = self.net.lipschitz * (net.encode_weight @ net.decode_weight)
        # Numbers of a generator of its own: neither the user's nor the training's are used up.
        noise = torch.randn(64, len(mixing), generator=torch.Generator().manual_seed(0))
        base = torch.cat([scale * noise for scale in _PROBES]).to(mixing)
        needed = 1
        for sign in (1, -1):
            v, change, count = base, 1.0, 0
            # Written so that a NaN ends it.
            while change > _TOLERANCE and count < _MAX_ITERATIONS:
                update = base - sign * functional.linear(net.dense(v), mixing)
                change, v = ((update - v).norm(dim=-1) / update.norm(dim=-1)).max().item(), update
                count += 1
            needed = max(needed, count)
        self._evaluation_iterations = needed

    @staticmethod
    def _on_state_dict(module: "MonotoneUnit", incompatible_keys: object) -> None:
        del incompatible_keys
        if not module.training:
            module._fix_iterations()

    def forward(
        self,
        x_or_z: Sequence[torch.Tensor],
        c: Iterable[torch.Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[torch.Tensor], torch.Tensor]:
        """Apply the unit, or its inverse.

        Args:
            x_or_z (Sequence[torch.Tensor]): One tensor of shape (N, dim).
            c (Iterable[torch.Tensor] | None): Unused.
            rev (bool): Apply the inverse.
            jac (bool): Also compute the log-determinant of the Jacobian, which is exact and costs a Jacobian of D
                in each row.

        Returns:
            tuple[tuple[torch.Tensor], torch.Tensor]: Output of shape (N, dim), and the log-determinant of shape (N,),
                or zeros if ``jac`` is false.
        """
        del c
        (x,) = x_or_z
        sign = -1.0 if rev else 1.0
        scale = sign * self.net.lipschitz
        # Computed here under grad: the solver's evaluations have no graph, and the cache of parametrizations would
        # keep their weights.
        net = self.net.folded()
        decode, shift = scale * net.decode_weight, scale * net.decode_bias
        mixing = net.encode_weight @ decode
        base = functional.linear(x, 2 * net.encode_weight, net.encode_bias - net.encode_weight @ shift)

        def update(v: torch.Tensor) -> torch.Tensor:
            return base - functional.linear(net.dense(v), mixing)

        iterations = self.iterations.training if self.training else self._evaluation_iterations
        v = fixed_point(update, base, iterations, self.iterations.backward)
        output = torch.addmm(x - shift, net.dense(v), decode.T, alpha=-1)
        log_det = _log_det(net, mixing, v) if jac else x.new_zeros(x.shape[0])
        return (output,), log_det

    def output_dims(self, input_dims: list[tuple[int]]) -> list[tuple[int]]:
        """Return the input dimensions: the unit keeps them."""
        return input_dims


def _log_det(net: FoldedDenseNet, mixing: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    # df/dx = (I - G')(I + G')^-1, and by Sylvester's identity det(I + L B D' A) = det(I + L D' A B), hidden_dim wide.
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: functional.linear(net.dense(row), mixing)))(v)
    identity = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    return torch.linalg.slogdet(identity - jacobian)[1] - torch.linalg.slogdet(identity + jacobian)[1]
