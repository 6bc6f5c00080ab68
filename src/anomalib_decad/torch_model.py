# SPDX-License-Identifier: Apache-2.0
"""DecAD as a torch module: encoder, decoupler, decoder, anomaly map."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn.utils import parametrize

from anomalib_decad.anomaly_map import AnomalyMapGenerator
from anomalib_decad.components import (
    AdversarialSynthesis,
    Decoupler,
    FeatureDecoder,
    FeatureFusion,
    FeatureStandardiser,
    ViTEncoder,
)

__all__ = ["DecADModel", "TrainingOutput"]


class TrainingOutput(NamedTuple):
    """What :class:`DecADModel` returns in training mode; the input of the loss.

    Args:
        features (list[torch.Tensor]): Standardised feature maps of the encoder, each of shape (B, N, dim).
        reconstructions (list[torch.Tensor]): Their reconstructions from ``x_clean``.
        x (torch.Tensor): Embeddings before perturbation, shape (B, N, dim).
        x_clean (torch.Tensor): Cleaned embeddings, shape (B, N, dim).
        energy (torch.Tensor): Abnormal energies of the perturbed embeddings, shape (B, N).
        perturbed (torch.Tensor): Which patches were perturbed, booleans of shape (B, N).
    """

    features: list[torch.Tensor]
    reconstructions: list[torch.Tensor]
    x: torch.Tensor
    x_clean: torch.Tensor
    energy: torch.Tensor
    perturbed: torch.Tensor


class DecADModel(nn.Module):
    """Detects anomalies as what a decoder cannot reconstruct after their removal in a latent space.

    A frozen vision transformer gives feature maps. Their fusion is cleaned patch by patch (:class:`Decoupler`), and a
    decoder reconstructs the standardised feature maps from it. In training mode, anomalies are synthesised in feature
    space.

    What depends on the data alone (statistics, principal axes, prior, prototypes) comes from a sample of normal images,
    given to :meth:`initialise` before training or taken from the first batch.

    Args:
        encoder (str): Name of a timm vision transformer.
        encoder_weights (str | Path | None): Local file with its weights; ``None`` for timm's pretrained weights.
        blocks (Sequence[int]): Encoder blocks whose outputs are reconstructed, counted from 1.
            Defaults to ``(3, 6, 9)``, the best of DecAD's ablation.
        num_blocks (int): Blocks of the invertible network.
        num_units (int): Units in each of these blocks.
        hidden_dim (int): Channels inside a unit.
        lipschitz (float): Bound of the Lipschitz constant of a unit's network, in (0, 1).
        pila_k (float): Sharpness of the activation Pila.
        abnormal_fraction (float): Share of the latent channels that hold the abnormal component, in (0, 1).
        prior_dim (int): Channels inside the prior's network; 0 for a prior of 0.
        delta (float): Radius of the synthetic anomalies in feature space.
        synthesis_fraction (float): Share of training images that get a synthetic anomaly, in (0, 1].
        synthesis_steps (int): Gradient steps of a synthetic anomaly; 0 for its random start.
        synthesis_noise (Literal["features", "gaussian"]): Where it starts, see :class:`AdversarialSynthesis`.
        synthesis_blob_size (int): About how many patches wide it is; 1 for scattered patches.
        decoder_depth (int): Transformer blocks of the decoder.
        num_prototypes (int): Prototypes in the decoder's memory; 0 for no memory.
        energy_power (float): Exponent of the abnormal energy in the anomaly map; 0 leaves it out.
        blur_sigma (float): Standard deviation of the anomaly map's blur in pixels; 0 for none.
        score_fraction (float): Share of an anomaly map's pixels whose mean is the image score, in (0, 1].
        decouple (bool): Whether anomalies are synthesised and removed; without, it is a plain reconstruction.
        pretrained (bool): Whether the encoder gets weights at all; a random one is good for tests only.

    Raises:
        ValueError: If an argument is out of its range.
        FileNotFoundError: If ``encoder_weights`` is no file.

    Example:
        >>> model = DecADModel(encoder="vit_small_patch14_dinov2").eval()
        >>> model(torch.rand(2, 3, 280, 280)).anomaly_map.shape
        torch.Size([2, 1, 280, 280])

    Reference:
        DecAD, ICCV 2025.
    """

    initialised: torch.Tensor

    def __init__(
        self,
        encoder: str = "vit_base_patch14_dinov2",
        encoder_weights: str | Path | None = None,
        blocks: Sequence[int] = (3, 6, 9),
        num_blocks: int = 3,
        num_units: int = 2,
        hidden_dim: int = 64,
        lipschitz: float = 0.9,
        pila_k: float = 5.0,
        abnormal_fraction: float = 0.5,
        prior_dim: int = 512,
        delta: float = 2.5,
        synthesis_fraction: float = 0.5,
        synthesis_steps: int = 1,
        synthesis_noise: Literal["features", "gaussian"] = "features",
        synthesis_blob_size: int = 4,
        decoder_depth: int = 2,
        num_prototypes: int = 2560,
        energy_power: float = 0.25,
        blur_sigma: float = 4.0,
        score_fraction: float = 0.01,
        decouple: bool = True,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = ViTEncoder(encoder, blocks, encoder_weights, pretrained)
        dim = self.encoder.dim
        self.standardiser = FeatureStandardiser(dim, len(blocks))
        self.fusion = FeatureFusion(dim)
        self.decoupler = (
            Decoupler(
                dim,
                abnormal_fraction=abnormal_fraction,
                prior_dim=prior_dim,
                num_blocks=num_blocks,
                num_units=num_units,
                hidden_dim=hidden_dim,
                lipschitz=lipschitz,
                k=pila_k,
            )
            if decouple
            else None
        )
        self.synthesis = AdversarialSynthesis(
            delta, synthesis_fraction, synthesis_steps, synthesis_noise, synthesis_blob_size
        )
        self.decoder = FeatureDecoder(dim, len(blocks), decoder_depth, self.encoder.num_heads, num_prototypes)
        self.anomaly_map_generator = AnomalyMapGenerator(blur_sigma, score_fraction, energy_power)
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, images: torch.Tensor) -> TrainingOutput | InferenceBatch:
        """Run the model.

        Args:
            images (torch.Tensor): Normalised images of shape (B, 3, H, W); H and W are multiples of the patch.

        Returns:
            TrainingOutput | InferenceBatch: In training mode the input of the loss; in eval mode ``pred_score`` of
                shape (B,) and ``anomaly_map`` of shape (B, 1, H, W).

        Raises:
            ValueError: If the image size does not fit the encoder.
        """
        height, width = images.shape[-2:]
        grid = self.encoder.grid(height, width)
        features = self.encoder(images)
        if self.training:
            return self.training_output(features, grid)
        return self.inference_output(features, grid, (height, width))

    def inference_output(
        self, features: Sequence[torch.Tensor], grid: tuple[int, int], image_size: tuple[int, int]
    ) -> InferenceBatch:
        """Remove anomalies, reconstruct and compare.

        Args:
            features (Sequence[torch.Tensor]): Feature maps of the encoder, each of shape (B, N, dim).
            grid (tuple[int, int]): Patch rows and columns, N = rows * columns.
            image_size (tuple[int, int]): Height and width of the anomaly maps in pixels.

        Returns:
            InferenceBatch: ``pred_score`` of shape (B,) and ``anomaly_map`` of shape (B, 1, H, W).
        """
        x = self.fusion(features)
        x_clean, energy = self.decoupler(x) if self.decoupler else (x, x.new_ones(x.shape[:-1]))
        reconstructions = self.decoder(x_clean)
        maps, scores = self.anomaly_map_generator(
            self.standardiser(features), reconstructions, grid, image_size, energy
        )
        return InferenceBatch(pred_score=scores, anomaly_map=maps)

    @torch.no_grad()
    def initialise(self, features: Sequence[torch.Tensor]) -> None:
        """Set what depends on the data alone, from the principal axes to the prototypes.

        Args:
            features (Sequence[torch.Tensor]): Feature maps of normal patches from the encoder, each of shape
                (..., dim): some ten thousand patches of all that is normal.

        Raises:
            RuntimeError: If the model is not in training mode.
        """
        if not self.training:
            msg = "initialise needs a model in training mode: call train() first"
            raise RuntimeError(msg)
        rows = [feature.flatten(0, -2) for feature in features]
        self.standardiser.initialise(rows)
        self.fusion.initialise(rows)
        x = self.fusion(rows)
        if self.decoupler:
            self.decoupler.initialise(x)
            self.decoupler.fit_prior(x)
            x, _ = self.decoupler(x)
        self.decoder.initialise(x, self.standardiser(rows))
        self.initialised.fill_(True)

    def frozen(self, image_size: tuple[int, int] | None) -> "DecADModel":
        """Copy the model for inference, faster and the same within rounding.

        What only training or other sizes need is computed once and multiplied into the weights: spectral norms, the
        solver's preconditioning, ActNorms, position embeddings. The copy can be pickled and exported.

        Args:
            image_size (tuple[int, int] | None): The only height and width that the copy will take, multiples of the
                patch, or ``None`` for any.

        Returns:
            DecADModel: The copy, in eval mode.

        Raises:
            ValueError: If the image size does not fit the encoder.
        """
        model = copy.deepcopy(self).eval()
        model.encoder.load_weights()
        if image_size is not None:
            model.encoder.freeze(*image_size)
        if model.decoupler:
            model.decoupler.freeze()
        return model.requires_grad_(False)

    def training_output(self, features: Sequence[torch.Tensor], grid: tuple[int, int] | None = None) -> TrainingOutput:
        """Synthesise anomalies, remove them and reconstruct.

        Args:
            features (Sequence[torch.Tensor]): Feature maps of the encoder, each of shape (B, N, dim).
            grid (tuple[int, int] | None): Patch rows and columns, N = rows * columns.
                Defaults to ``None``: a square grid.

        Returns:
            TrainingOutput: The input of the loss.
        """
        if not self.initialised:
            self.initialise(features)
        standardised = self.standardiser(features)
        x = self.fusion(features)
        if self.decoupler is None:
            zeros = x.new_zeros(x.shape[:-1])
            return TrainingOutput(standardised, self.decoder(x), x, x, zeros, zeros.bool())
        # One cache around all passes of the step: the spectral norms are computed once.
        with parametrize.cached():
            perturbed, mask = self.synthesis(x, self.decoupler.energy, grid)
            x_clean, energy = self.decoupler(perturbed)
        return TrainingOutput(standardised, self.decoder(x_clean), x, x_clean, energy, mask)
