# SPDX-License-Identifier: Apache-2.0
"""DecAD as a torch module: encoder, decoupler, decoder, anomaly map."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from anomalib_decad.components import (
    AdversarialSynthesis,
    CategoryPrediction,
    CategoryRecognizer,
    Decoupler,
    FeatureDecoder,
    FeatureFusion,
    FeatureStandardizer,
    ViTEncoder,
    choose_patches,
)
from anomalib_decad.components.synthesis import square_grid
from anomalib_decad.components.whitening import average_features
from anomalib_decad.models.decad.anomaly_map import AnomalyMapGenerator

__all__ = ["DecADModel", "TrainingOutput"]

#: How far the initialization is, by the time that it takes on a CPU: with the principal axes, with the invertible
#: network, and with the prior.
_FITTED = 0.15, 0.25, 0.8


class TrainingOutput(NamedTuple):
    """What :class:`DecADModel` returns in training mode; the input of the loss.

    Args:
        features (list[torch.Tensor]): Standardized feature maps of the encoder, each of shape (B, N, dim).
        reconstructions (list[torch.Tensor]): Their reconstructions from ``x_clean``.
        x (torch.Tensor): Embeddings before perturbation, shape (B, N, dim).
        x_clean (torch.Tensor): Cleaned embeddings, shape (B, N, dim).
        energy (torch.Tensor): Abnormal energies of the perturbed embeddings, shape (B, N).
        perturbed (torch.Tensor): Which patches were perturbed, booleans of shape (B, N).
        prior_loss (torch.Tensor | None): Squared errors of the prior in unperturbed patches, shape (K,), if any.
    """

    features: list[torch.Tensor]
    reconstructions: list[torch.Tensor]
    x: torch.Tensor
    x_clean: torch.Tensor
    energy: torch.Tensor
    perturbed: torch.Tensor
    prior_loss: torch.Tensor | None = None


class DecADModel(nn.Module):
    """Detects anomalies as what a decoder cannot reconstruct after their removal in a latent space.

    A frozen vision transformer gives feature maps. Their fusion is cleaned patch by patch (:class:`Decoupler`), and a
    decoder reconstructs the standardized feature maps from it. In training mode, anomalies are synthesized in feature
    space.

    What depends on the data alone (statistics, principal axes, prior, linear maps) comes from a sample of normal
    images: :meth:`initialize` has to be called before training.

    Args:
        encoder (ViTEncoder): Gives the feature maps.
        decoupler (Decoupler | None): Removes what is abnormal from embeddings of the encoder's channels.
            ``None``: nothing is removed, a plain reconstruction.
        synthesis (AdversarialSynthesis | None): Perturbs embeddings in training mode.
            ``None``: none are perturbed.
        decoder (FeatureDecoder): Reconstructs as many feature maps as the encoder gives.
        anomaly_map (AnomalyMapGenerator): Compares.

    Example:
        >>> encoder = ViTEncoder("test_vit", [1, 2, 3], pretrained=False)
        >>> decoder = FeatureDecoder(encoder.dim, num_layers=3, num_heads=4)
        >>> model = DecADModel(
        ...     encoder, Decoupler(encoder.dim), AdversarialSynthesis(), decoder, AnomalyMapGenerator()
        ... ).eval()
        >>> model(torch.rand(2, 3, 64, 64)).anomaly_map.shape
        torch.Size([2, 1, 64, 64])

    Reference:
        DecAD, ICCV 2025.
    """

    initialized: torch.Tensor

    def __init__(
        self,
        encoder: ViTEncoder,
        decoupler: Decoupler | None,
        synthesis: AdversarialSynthesis | None,
        decoder: FeatureDecoder,
        anomaly_map: AnomalyMapGenerator,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.recognizer = CategoryRecognizer()
        self.standardizer = FeatureStandardizer(encoder.dim, len(encoder.layers))
        self.fusion = FeatureFusion(encoder.dim)
        self.decoupler = decoupler
        self.synthesis = synthesis
        self.decoder = decoder
        self.anomaly_map_generator = anomaly_map
        self.register_buffer("initialized", torch.tensor(False))
        # The same as a Python value: reading the buffer would make a device wait in each step.
        self.is_initialized = False
        self.register_load_state_dict_post_hook(self._on_state_dict)

    @staticmethod
    def _on_state_dict(module: "DecADModel", incompatible_keys: object) -> None:
        del incompatible_keys
        module.is_initialized = bool(module.initialized)

    @property
    def refines_by_image(self) -> bool:
        """Whether the prior has a part that is fitted to whole images."""
        return self.decoupler is not None and self.decoupler.image_prior is not None

    def forward(self, images: torch.Tensor) -> TrainingOutput | CategoryPrediction:
        """Run the model.

        Args:
            images (torch.Tensor): Normalized images of shape (B, 3, H, W); H and W are multiples of the patch.

        Returns:
            TrainingOutput | CategoryPrediction: In training mode the input of the loss; in eval mode ``pred_score`` of
                shape (B,), ``anomaly_map`` of shape (B, 1, H, W) and ``category`` of shape (B,).

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
    ) -> CategoryPrediction:
        """Remove anomalies, reconstruct and compare.

        Args:
            features (Sequence[torch.Tensor]): Feature maps of the encoder, each of shape (B, N, dim).
            grid (tuple[int, int]): Patch rows and columns, N = rows * columns.
            image_size (tuple[int, int]): Height and width of the anomaly maps in pixels.

        Returns:
            CategoryPrediction: ``pred_score`` of shape (B,), ``anomaly_map`` of shape (B, 1, H, W), and ``category`` of
                shape (B,), the index of the category that each image resembles most.
        """
        x = self.fusion(features)
        x_clean, energy = self.remove(x, grid)
        reconstructions = self.decoder(x_clean)
        maps, scores = self.anomaly_map_generator(
            self.standardizer(features), reconstructions, grid, image_size, energy
        )
        return CategoryPrediction(pred_score=scores, anomaly_map=maps, category=self.recognizer(features))

    def remove(self, x: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Remove what is abnormal; nothing, where there is no decoupler.

        Args:
            x (torch.Tensor): Embeddings of shape (B, N, dim).
            grid (tuple[int, int]): Patch rows and columns, N = rows * columns.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Cleaned embeddings of the same shape, and abnormal energies of shape
                (B, N), all 1 where there is no decoupler.
        """
        return self.decoupler(x, grid)[:2] if self.decoupler else (x, x.new_ones(x.shape[:-1]))

    @torch.no_grad()
    def initialize(
        self,
        features: Sequence[torch.Tensor],
        images: Sequence[torch.Tensor] | None = None,
        grid: tuple[int, int] | None = None,
        report: Callable[[float], None] | None = None,
    ) -> None:
        """Set what depends on the data alone, from the principal axes to the decoder's linear maps.

        Args:
            features (Sequence[torch.Tensor]): Feature maps of normal patches from the encoder, each of shape
                (..., dim): some ten thousand patches of all that is normal.
            images (Sequence[torch.Tensor] | None): Feature maps of whole normal images, each of shape (B, N, dim): some
                of each product. What other patches of an image say about a patch is fitted to them, where the
                decoupler has such a part.
                Defaults to ``None``: others say nothing until the training has taught it.
            grid (tuple[int, int] | None): Patch rows and columns of these images, N = rows * columns.
                Defaults to ``None``: a square grid.
            report (Callable[[float], None] | None): Is told now and then which part has been done, in [0, 1].
                Defaults to ``None``: nobody is.

        Raises:
            RuntimeError: If the model is not in training mode.
            ValueError: If a feature is not finite.
        """
        if not all(torch.isfinite(feature).all() for feature in features):
            msg = (
                "features of the training images are not finite (NaN or infinite): train with --trainer.precision 32, "
                "and see whether the encoder's weights are sound"
            )
            raise ValueError(msg)
        if not self.training:
            msg = "initialize needs a model in training mode: call train() first"
            raise RuntimeError(msg)
        report = report or (lambda _: None)
        rows = [feature.flatten(0, -2) for feature in features]
        self.standardizer.initialize(rows)
        self.fusion.initialize(rows)
        x = self.fusion(rows)
        report(_FITTED[0])
        if self.decoupler:
            self.decoupler.initialize(x)
            first, last = _FITTED[1:]
            report(first)
            x = self.decoupler.fit_prior(x, lambda part: report(first + part * (last - first)))
            if images is not None and self.refines_by_image:
                x, rows = self._clean_images(self.decoupler, images, grid or square_grid(images[0].shape[1]), len(x))
        self.decoder.initialize(x, self.standardizer(rows))
        self.initialized.fill_(True)
        self.is_initialized = True

    def _clean_images(
        self, decoupler: Decoupler, images: Sequence[torch.Tensor], grid: tuple[int, int], count: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Fit the prior to images; give about so many cleaned patches of theirs, and their features."""
        chosen = choose_patches(average_features(images), max(count // len(images[0]), 1))
        clean = decoupler.fit_image_prior(self.fusion(images), grid, chosen)
        index = chosen[..., None].expand(-1, -1, images[0].shape[-1])
        return clean, [feature.gather(1, index).flatten(0, 1) for feature in images]

    @property
    def keep_in_float32(self) -> list[str]:
        """Names of the parts that quantization leaves in floating point.

        Whitening and removal are only faithful if they are accurate, and the prior takes exponentials of differences
        between large numbers.
        """
        return ["fusion", "standardizer", "decoupler"] if self.decoupler else ["fusion", "standardizer"]

    def fused(self, image_size: tuple[int, int] | None) -> "DecADModel":
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
            model.encoder.fuse(*image_size)
            model.anomaly_map_generator.fuse(model.encoder.grid(*image_size), image_size)
            model.to(self.initialized.device)
        if model.decoupler:
            model.decoupler.fuse()
        return model.requires_grad_(False)

    def training_output(self, features: Sequence[torch.Tensor], grid: tuple[int, int] | None = None) -> TrainingOutput:
        """Synthesize anomalies, remove them and reconstruct.

        Args:
            features (Sequence[torch.Tensor]): Feature maps of the encoder, each of shape (B, N, dim).
            grid (tuple[int, int] | None): Patch rows and columns, N = rows * columns.
                Defaults to ``None``: a square grid.

        Returns:
            TrainingOutput: The input of the loss.

        Raises:
            RuntimeError: If the model has not been initialized.
        """
        grid = grid or square_grid(features[0].shape[1])
        if not self.is_initialized:
            msg = "the model has not been initialized: call initialize() with features of normal images first"
            raise RuntimeError(msg)
        standardized = self.standardizer(features)
        x = self.fusion(features)
        unchanged = x, x.new_zeros(x.shape[:-1]).bool()
        if self.decoupler is None:
            return TrainingOutput(standardized, self.decoder(x), x, x, x.new_zeros(x.shape[:-1]), unchanged[1])
        weights = self.decoupler.fold()
        perturbed, mask = unchanged
        if self.synthesis is not None:
            perturbed, mask = self.synthesis(x, partial(self.decoupler.energy, weights=weights), grid)
        output = self.decoupler(perturbed, grid, weights)
        prior_loss = self.decoupler.update_statistics(output, mask)
        reconstructions = self.decoder(output.x_clean)
        return TrainingOutput(standardized, reconstructions, x, output.x_clean, output.energy, mask, prior_loss)
