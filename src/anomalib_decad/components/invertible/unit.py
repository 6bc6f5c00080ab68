# SPDX-License-Identifier: Apache-2.0
"""The invertible unit of DecAD's network."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from FrEIA.modules import InvertibleModule
from torch.nn import functional

from anomalib_decad.components.invertible.dense_net import FusedDenseNet, LipschitzDenseNet, dense
from anomalib_decad.components.invertible.fused import FusedUnit

__all__ = ["MonotoneUnit", "SolverIterations", "solver_dtype"]


# Relative change of the last iteration in eval mode. The error is about a tenth of it, as each iteration gains
# about a digit, and the round trip of a whole network is then within 1e-4.
_TOLERANCE = 2e-5
_MAX_ITERATIONS = 64
# Standard deviations of the random latents that convergence is tried on.
_PROBES = (0.1, 1.0, 10.0)


class SolverIterations(NamedTuple):
    """How many iterations the fixed points of a unit get.

    Args:
        evaluation (int | None): In eval mode and in exported graphs, where the inverse must be accurate.
            Defaults to ``None``: as many as bring the last change of every random latent below 2e-5 of it, at most 64.
            That number follows from the weights alone, when the unit is put into eval mode.
        training (int): In training mode, before the last one; each gains about a digit.
        backward (int): For the implicit gradient.
    """

    evaluation: int | None = None
    training: int = 2
    backward: int = 2


class MonotoneUnit(InvertibleModule):
    r"""Inverts a monotone operator: :math:`f(x) = (\frac{Id + G}{2})^{-1}(x) - x`.

    With u the solution of :math:`(u + G(u))/2 = x`, :math:`f(x) = u - x`. As G has a Lipschitz constant below 1, u is
    the fixed point of the contraction :math:`u = 2x - G(u)`, and the inverse of :math:`f_G` is :math:`f_{-G}`, which
    costs the same.

    How the fixed point is found is told in :class:`FusedUnit`.

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
        iterations: SolverIterations = SolverIterations(),
    ) -> None:
        super().__init__(dims_in, dims_c)
        if self.dims_c:
            msg = "MonotoneUnit takes no condition"
            raise ValueError(msg)
        ((dim,),) = self.dims_in
        self.net = LipschitzDenseNet(dim, hidden_dim, growth, depth, lipschitz, k)
        self.iterations = iterations
        self._evaluation_iterations = _MAX_ITERATIONS
        self._preconditioned = True
        self._folds: dict[tuple[bool, torch.dtype], FusedUnit] | None = None
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
        needed = {preconditioned: self._needed_iterations(preconditioned) for preconditioned in (True, False)}
        # Weights close to the Lipschitz bound may want the plain iteration, which always converges.
        self._preconditioned = needed[True] < needed[False]
        fixed = self.iterations.evaluation
        # The solver adds a last one.
        self._evaluation_iterations = needed[self._preconditioned] - 1 if fixed is None else fixed

    def _needed_iterations(self, preconditioned: bool) -> int:
        needed = 1
        for rev in (False, True):
            unit = self._fused(rev, preconditioned)
            # Numbers of a generator of its own: neither the user's nor the training's are used up.
            noise = torch.randn(64, len(unit.start_bias), generator=torch.Generator().manual_seed(0))
            start = torch.cat([scale * noise for scale in _PROBES]).to(unit.start_bias)
            v, change, count = start, 1.0, 0
            # Written so that a NaN ends it.
            while change > _TOLERANCE and count < _MAX_ITERATIONS:
                update = unit.update(v, start)
                change, v = ((update - v).norm(dim=-1) / update.norm(dim=-1)).max().item(), update
                count += 1
            needed = max(needed, count if change <= _TOLERANCE else _MAX_ITERATIONS)
        return needed

    def _fused(self, rev: bool, preconditioned: bool) -> FusedUnit:
        return FusedUnit.from_dense_net(
            self.net.fused(), -self.net.lipschitz if rev else self.net.lipschitz, preconditioned
        )

    @property
    def is_folded(self) -> bool:
        """Whether :meth:`folded` is in force."""
        return self._folds is not None

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Fold the weights once for all passes within; they must not change meanwhile."""
        outer, self._folds = self._folds, {} if self._folds is None else self._folds
        try:
            yield
        finally:
            self._folds = outer

    def _fold(self, rev: bool, dtype: torch.dtype) -> FusedUnit:
        folds = {} if self._folds is None else self._folds
        if (rev, dtype) not in folds:
            # Under grad, whatever the first pass needs: later ones may want it.
            with torch.set_grad_enabled(torch.is_grad_enabled() or self._folds is not None):
                folds[rev, dtype] = self._fused(rev, self._preconditioned or self.training).to(dtype)
        return folds[rev, dtype]

    @staticmethod
    def fold_together(units: Sequence["MonotoneUnit"], dtype: torch.dtype) -> None:
        """Fold the weights of units of the same shape at once, in a fraction of the operations; all are in training.

        Args:
            units (Sequence[MonotoneUnit]): The units, inside of :meth:`folded`.
            dtype (torch.dtype): Precision of the folded weights.
        """
        lipschitz, k = units[0].net.lipschitz, units[0].net.k
        tensors = [torch.stack(values) for values in zip(*(unit.net.tensors() for unit in units), strict=True)]

        def fold(*values: torch.Tensor) -> list[list[torch.Tensor]]:
            net = FusedDenseNet.from_tensors(k, *values)
            return [FusedUnit.from_dense_net(net, sign * lipschitz).flat() for sign in (1, -1)]

        for rev, stacked in zip((False, True), torch.vmap(fold)(*tensors), strict=True):
            parts = zip(*(tensor.to(dtype).unbind() for tensor in stacked), strict=True)
            for unit, part in zip(units, parts, strict=True):
                unit._folds = {**(unit._folds or {}), (rev, dtype): FusedUnit.from_flat(part)}

    def fused(self, rev: bool) -> tuple[FusedUnit, int]:
        """Compute the unit's plain weights in one direction, and its number of iterations in eval mode.

        Args:
            rev (bool): Whether the inverse is meant.

        Returns:
            tuple[FusedUnit, int]: The weights and the number.
        """
        return self._fused(rev, self._preconditioned), self._evaluation_iterations

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
        dtype = solver_dtype(x, self.training)
        with torch.autocast(x.device.type, enabled=False):
            iterations = self.iterations.training if self.training else self._evaluation_iterations
            unit = self._fold(rev, dtype)
            features = unit.solve(x.to(dtype), iterations, self.iterations.backward)
            output = unit.output(x, features)
            log_det = x.new_zeros(x.shape[0])
            if jac:
                v = features[:, : len(unit.start_bias)].to(x.dtype)
                log_det = _log_det(self.net.encode.weight, self._fold(rev, x.dtype), v)
        return (output,), log_det

    def output_dims(self, input_dims: list[tuple[int]]) -> list[tuple[int]]:
        """Return the input dimensions: the unit keeps them."""
        return input_dims


def solver_dtype(x: torch.Tensor, training: bool) -> torch.dtype:
    """Choose the precision of G; the input ``x`` always bypasses it in its own."""
    device = x.device.type
    is_bfloat16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    return torch.bfloat16 if is_bfloat16 and training else x.dtype


def _log_det(encode_weight: torch.Tensor, unit: FusedUnit, v: torch.Tensor) -> torch.Tensor:
    mixing = -encode_weight @ unit.output_weight
    # df/dx = (I - G')(I + G')^-1, and by Sylvester's identity det(I + L B D' A) = det(I + L D' A B), hidden_dim wide.
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: functional.linear(dense(row, unit.layers), mixing)))(v)
    identity = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    return torch.linalg.slogdet(identity - jacobian)[1] - torch.linalg.slogdet(identity + jacobian)[1]
