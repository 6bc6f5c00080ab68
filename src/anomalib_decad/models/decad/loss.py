# SPDX-License-Identifier: Apache-2.0
"""The training objective of DecAD."""

import torch
from torch import nn

from anomalib_decad.components.losses import DecouplingLoss
from anomalib_decad.components.options import DecouplingLossOptions
from anomalib_decad.models.decad.anomaly_map import AnomalyMapGenerator
from anomalib_decad.models.decad.torch_model import TrainingOutput

__all__ = ["DecADLoss"]


class DecADLoss(nn.Module):
    """Reconstruction plus the terms of :class:`DecouplingLoss`.

    ``reconstruction`` is the mean over layers and patches of 1 - cosine similarity between a feature map and its
    reconstruction from the cleaned embeddings.

    Args:
        options (DecouplingLossOptions): Weights of the other terms beside it, and the margin.
    """

    def __init__(self, options: DecouplingLossOptions = DecouplingLossOptions()) -> None:
        super().__init__()
        self.decoupling = DecouplingLoss(options)

    def forward(self, output: TrainingOutput) -> dict[str, torch.Tensor]:
        """Compute the terms and their sum.

        Args:
            output (TrainingOutput): What the model returns in training mode.

        Returns:
            dict[str, torch.Tensor]: The terms, times their weights, and their sum ``loss``.
        """
        terms = {
            "reconstruction": AnomalyMapGenerator.patch_errors(output.features, output.reconstructions).mean(),
            **self.decoupling(output.x, output.x_clean, output.energy, output.perturbed, output.prior_error),
        }
        return {**terms, "loss": torch.stack(list(terms.values())).sum()}
