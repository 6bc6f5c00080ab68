# SPDX-License-Identifier: Apache-2.0
"""The training objective of DecAD."""

import torch
from torch import nn

from anomalib_decad.components import DecouplingLoss
from anomalib_decad.components.decoder import patch_errors
from anomalib_decad.components.options import DecouplingLossOptions
from anomalib_decad.models.decad.torch_model import TrainingOutput
from anomalib_decad.ranges import check_range

__all__ = ["DecADLoss"]

# Of an error, which is in [0, 2] but for rounding.
_TINY = 1e-6


class DecADLoss(nn.Module):
    r"""Reconstruction plus the terms of :class:`DecouplingLoss`.

    The error e of a patch is the mean over the layers of 1 - cosine similarity between a feature map and its
    reconstruction from the cleaned embeddings. ``reconstruction`` is the mean of the errors over the patches of a
    batch, each times :math:`e^q` over its mean, a weight without a gradient. Synthetic anomalies, which are hard on
    purpose, have a weight of 1.

    Most patches of an image are easy, above all where most of it is background. All alike, they make up the gradient,
    and what is rare in an image stays hard: the largest errors of a normal image then outvote a small defect. Measured
    (``benchmarks/NOTES.md``, "Hard patches"): with q = 2 screw's image AUROC is 79.9 instead of 77.7 after 1,000 steps.

    Args:
        options (DecouplingLossOptions): Weights of the other terms beside it, and the margin.
        focal_exponent (float): The power q, not negative; 0 for a plain mean.
            Defaults to ``2.0``.

    Raises:
        ValueError: If ``focal_exponent`` is negative.
    """

    def __init__(self, options: DecouplingLossOptions = DecouplingLossOptions(), focal_exponent: float = 2.0) -> None:
        super().__init__()
        check_range(focal_exponent >= 0, "focal_exponent", "at least 0", focal_exponent)
        self.focal_exponent = focal_exponent
        self.decoupling = DecouplingLoss(options)

    def forward(self, output: TrainingOutput) -> dict[str, torch.Tensor]:
        """Compute the terms and their sum.

        Args:
            output (TrainingOutput): What the model returns in training mode.

        Returns:
            dict[str, torch.Tensor]: The terms, times their weights, and their sum ``loss``.
        """
        errors = patch_errors(output.features, output.reconstructions)
        terms = {
            "reconstruction": (self._weights(errors.detach(), output.perturbed) * errors).mean(),
            **self.decoupling(output.x, output.x_clean, output.energy, output.perturbed),
        }
        return {**terms, "loss": torch.stack(list(terms.values())).sum()}

    def _weights(self, errors: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
        """Weigh patches by their errors, so that the mean weight of those that were not perturbed is 1."""
        errors = errors.clamp(min=_TINY).masked_fill(perturbed, 0.0)
        # Of shares of the largest, as a high power of a small number is 0.
        powers = (errors / errors.amax().clamp(min=_TINY)) ** self.focal_exponent
        mean = (powers * ~perturbed).sum() / (~perturbed).sum().clamp(min=1)
        return (powers / mean).masked_fill(perturbed, 1.0)
