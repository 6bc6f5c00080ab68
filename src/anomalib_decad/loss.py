# SPDX-License-Identifier: Apache-2.0
"""The training objective of DecAD."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from anomalib_decad.anomaly_map import AnomalyMapGenerator
from anomalib_decad.torch_model import TrainingOutput

__all__ = ["DecADLoss", "decoupling_terms"]


class DecADLoss(nn.Module):
    r"""Weighted sum of four terms.

    - ``reconstruction``: mean over taps and patches of 1 - cosine similarity between a feature map and its
      reconstruction from the cleaned embeddings.
    - ``normal_energy``: mean abnormal energy H of unperturbed patches, which the prior wants to be 0.
    - ``abnormal_energy``: mean hinge :math:`\max(0, m - H)` of perturbed patches.
    - ``restoration``: :math:`\|\hat{x} - x\|^2 / \|x\|^2`, each averaged over the patches, with x the embedding before
      perturbation: removal restores it.

    Args:
        margin (float): Energy m that a perturbed patch should have; positive.
            Defaults to ``1.0``.
        reconstruction_weight (float): Weight of the term.
            Defaults to ``1.0``.
        normal_weight (float): Weight of ``normal_energy``.
            Defaults to ``1.0``.
        abnormal_weight (float): Weight of ``abnormal_energy``.
            Defaults to ``1.0``.
        restoration_weight (float): Weight of the term.
            Defaults to ``1.0``.

    Raises:
        ValueError: If ``margin`` is not positive.
    """

    def __init__(
        self,
        margin: float = 1.0,
        reconstruction_weight: float = 1.0,
        normal_weight: float = 1.0,
        abnormal_weight: float = 1.0,
        restoration_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not margin > 0:
            msg = f"margin must be positive, got {margin}"
            raise ValueError(msg)
        self.margin = margin
        self.weights: Mapping[str, float] = {
            "reconstruction": reconstruction_weight,
            "normal_energy": normal_weight,
            "abnormal_energy": abnormal_weight,
            "restoration": restoration_weight,
        }

    def forward(self, output: TrainingOutput) -> dict[str, torch.Tensor]:
        """Compute the terms and their weighted sum.

        Args:
            output (TrainingOutput): What the model returns in training mode.

        Returns:
            dict[str, torch.Tensor]: The four terms, unweighted, and their weighted sum ``loss``.
        """
        terms = {
            "reconstruction": AnomalyMapGenerator.patch_errors(output.features, output.reconstructions).mean(),
            **decoupling_terms(output.x, output.x_clean, output.energy, output.perturbed, self.margin),
        }
        terms["loss"] = torch.stack([weight * terms[name] for name, weight in self.weights.items()]).sum()
        return terms


def decoupling_terms(
    x: torch.Tensor, x_clean: torch.Tensor, energy: torch.Tensor, perturbed: torch.Tensor, margin: float
) -> dict[str, torch.Tensor]:
    """Compute the terms of the loss that only need the embeddings, see :class:`DecADLoss`.

    Args:
        x (torch.Tensor): Embeddings before perturbation, shape (B, N, dim).
        x_clean (torch.Tensor): Embeddings after removal, shape (B, N, dim).
        energy (torch.Tensor): Abnormal energies of the perturbed embeddings, shape (B, N).
        perturbed (torch.Tensor): Which patches were perturbed, booleans of shape (B, N).
        margin (float): Energy that a perturbed patch should have.

    Returns:
        dict[str, torch.Tensor]: ``normal_energy``, ``abnormal_energy`` and ``restoration``.
    """
    return {
        "normal_energy": _mean(energy[~perturbed]),
        "abnormal_energy": _mean(functional.relu(margin - energy[perturbed])),
        "restoration": (x_clean - x).square().mean() / x.square().mean(),
    }


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Mean that is 0 for no values: a batch may have no perturbed patch."""
    return values.sum() / max(values.numel(), 1)
