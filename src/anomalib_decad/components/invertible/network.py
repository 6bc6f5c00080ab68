# SPDX-License-Identifier: Apache-2.0
"""The invertible network F of DecAD."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from FrEIA.framework import SequenceINN
from torch import nn
from torch.nn.utils import parametrize

from anomalib_decad.components.invertible.act_norm import ActNorm
from anomalib_decad.components.invertible.fused import FusedNetwork, FusedUnit
from anomalib_decad.components.invertible.unit import MonotoneUnit, SolverIterations, solver_dtype
from anomalib_decad.components.options import InvertibleOptions
from anomalib_decad.components.precision import at_least_float32
from anomalib_decad.ranges import check_range

__all__ = ["InvertibleNetwork"]


class InvertibleNetwork(nn.Module):
    r"""Invertible map of each patch embedding to the latent space, :math:`F = F_R \circ \dots \circ F_1`.

    Each block :math:`F_r = f_K \circ \dots \circ f_1` is a chain of :class:`MonotoneUnit` with an
    :class:`ActNorm` behind it. Computed in at least float32, also under automatic mixed precision: in half precision
    the inverse would not be one. Only G is computed in bfloat16, in training mode under automatic mixed precision with
    it: inputs bypass G, so what is rounded is the change that a unit makes.

    Args:
        dim (int): Number of channels of an embedding.
        options (InvertibleOptions): Its shape.
        iterations (SolverIterations): Number of solver iterations.
        learned_norms (bool): Whether the ActNorms are learned after their start.
            Defaults to ``True``.

    Raises:
        ValueError: If ``dim`` is below 1.

    Example:
        >>> network = InvertibleNetwork(dim=32).eval()
        >>> x = torch.randn(4, 100, 32)
        >>> torch.allclose(network.inverse(network(x)), x, atol=1e-4)
        True

    Reference:
        DecAD, ICCV 2025, supplement: R = 3, K = 2.
    """

    def __init__(
        self,
        dim: int,
        options: InvertibleOptions = InvertibleOptions(),
        iterations: SolverIterations = SolverIterations(),
        learned_norms: bool = True,
    ) -> None:
        super().__init__()
        check_range(dim >= 1, "dim", "at least 1", dim)
        self.dim = dim
        self.sequence = SequenceINN(dim)
        for _ in range(options.num_blocks):
            for _ in range(options.num_units):
                self.sequence.append(
                    MonotoneUnit,
                    hidden_dim=options.hidden_dim,
                    lipschitz=options.lipschitz,
                    k=options.pila_k,
                    iterations=iterations,
                )
            self.sequence.append(ActNorm, is_learned=learned_norms)

    def initialize(self, x: torch.Tensor) -> None:
        """Initialize the ActNorms from normal embeddings, unless they have been. Only in training mode.

        Args:
            x (torch.Tensor): Embeddings of shape (..., dim).
        """
        pending = (not module.is_initialized for module in self.modules() if isinstance(module, ActNorm))
        if self.training and any(pending):
            with torch.no_grad():
                self(x)

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Normalize and fold the weights once for all passes within, forward and inverse; they must not change."""
        units = [module for module in self.sequence.module_list if isinstance(module, MonotoneUnit)]
        is_outermost = not any(unit.is_folded for unit in units)
        with ExitStack() as stack:
            stack.enter_context(parametrize.cached())
            for unit in units:
                stack.enter_context(unit.folded())
            if units and self.training and is_outermost:
                weight = units[0].net.gain
                dtype = solver_dtype(weight, training=True)
                with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
                    MonotoneUnit.fold_together(units, dtype)
            yield

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map embeddings to the latent space.

        Args:
            x (torch.Tensor): Embeddings of shape (..., dim).

        Returns:
            torch.Tensor: Latents of shape (..., dim).
        """
        return self._run(x, rev=False)

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """Map latents back to embeddings.

        Args:
            z (torch.Tensor): Latents of shape (..., dim).

        Returns:
            torch.Tensor: Embeddings of shape (..., dim).
        """
        return self._run(z, rev=True)

    @torch.no_grad()
    def fused(self) -> FusedNetwork:
        """Copy the network for inference: faster, the same within rounding, and free of parametrizations.

        Returns:
            FusedNetwork: The copy, which can be pickled and exported.
        """
        is_training = self.training
        # In training mode the spectral norms would go on with their iteration.
        self.eval()
        forward_units: list[tuple[FusedUnit, int]] = []
        inverse_units: list[tuple[FusedUnit, int]] = []
        for module in self.sequence.module_list:
            if isinstance(module, ActNorm):
                scale, bias = module.scale.exp(), module.bias
                unit, iterations = forward_units[-1]
                forward_units[-1] = unit.then_affine(scale, bias), iterations
                unit, iterations = inverse_units[-1]
                inverse_units[-1] = unit.after_affine(1 / scale, -bias / scale), iterations
            else:
                forward_units.append(module.fused(rev=False))
                inverse_units.append(module.fused(rev=True))
        self.train(is_training)
        return FusedNetwork(forward_units, reversed(inverse_units))

    def _run(self, x: torch.Tensor, rev: bool) -> torch.Tensor:
        rows = at_least_float32(x.reshape(-1, self.dim))
        output, _ = self.sequence(rows, rev=rev, jac=False)
        return output.reshape(x.shape)
