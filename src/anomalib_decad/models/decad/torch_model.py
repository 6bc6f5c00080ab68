# SPDX-License-Identifier: Apache-2.0
"""DecAD as a torch module: encoder, decoupler, decoder, anomaly map."""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, cast

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
    PatchSample,
    PrototypePrior,
    Prototypes,
    ViTEncoder,
    sample_patches,
)
from anomalib_decad.models.decad.anomaly_map import AnomalyMapGenerator

__all__ = ["DecADModel", "TrainingOutput"]

#: Images that are cleaned at once.
_IMAGES = 16


class TrainingOutput(NamedTuple):
    """What :class:`DecADModel` returns in training mode; the input of the loss.

    Args:
        features (list[torch.Tensor]): Standardized feature maps of the encoder, each of shape (B, N, dim).
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
    decoder reconstructs the standardized feature maps from it. In training mode, anomalies are synthesized in feature
    space.

    What depends on the data alone (statistics, principal axes, prototypes, linear maps) comes from normal images:
    :meth:`initialize` has to be called before training.

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
        >>> model = DecADModel(encoder, Decoupler(encoder.dim), None, decoder, AnomalyMapGenerator()).eval()
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
        distance, product = self.recognizer.nearest(self.recognizer.describe(features))
        x_clean, energy = self.remove(self.fusion(features), product)
        reconstructions = self.decoder(x_clean)
        maps, scores = self.anomaly_map_generator(
            self.standardizer(features), reconstructions, grid, image_size, energy
        )
        category = self.recognizer.known(distance, product)
        return CategoryPrediction(pred_score=scores, anomaly_map=maps, category=category)

    def remove(
        self, x: torch.Tensor, product: torch.Tensor, without: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Remove what is abnormal; nothing, where there is no decoupler.

        Args:
            x (torch.Tensor): Embeddings of shape (B, N, dim).
            product (torch.Tensor): Index of the product that each image shows, shape (B,).
            without (torch.Tensor | None): As of :meth:`Decoupler.forward`. Defaults to ``None``.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Cleaned embeddings of the same shape, and abnormal energies of shape
                (B, N), all 1 where there is no decoupler.
        """
        return self.decoupler(x, product, without) if self.decoupler else (x, x.new_ones(x.shape[:-1]))

    @torch.no_grad()
    def initialize(
        self,
        sample: PatchSample,
        products: Callable[[], Sequence[Prototypes]] | None = None,
    ) -> None:
        """Set what depends on the data alone, from the principal axes to the decoder's linear maps.

        Args:
            sample (PatchSample): Normal patches: some ten thousand of all that is normal.
            products (Callable | None): Gives the prototypes of each product (:meth:`prototypes`), in the order of the
                recognizer's names, when the latent space is there.
                Defaults to ``None``: the sample is all that is known of a single product.

        Raises:
            ValueError: If a feature is not finite.
        """
        features, descriptors = sample
        if not all(torch.isfinite(feature).all() for feature in features):
            msg = (
                "features of the training images are not finite (NaN or infinite): train with --trainer.precision 32, "
                "and see whether the encoder's weights are sound"
            )
            raise ValueError(msg)
        self.standardizer.initialize(features)
        self.fusion.initialize(features)
        x = self.fusion(features)
        if self.decoupler:
            self.decoupler.initialize(x)
            if self.decoupler.prior is not None:
                known = products() if products else [self._prototypes_of(x, descriptors)]
                self.decoupler.prior.set(known)
            x = self._clean(self.decoupler, x, descriptors)
        self.decoder.initialize(x.flatten(0, 1), [rows.flatten(0, 1) for rows in self.standardizer(features)])
        self.initialized.fill_(True)
        self.is_initialized = True

    @torch.no_grad()
    def prototypes(self, batches: Iterable[Sequence[torch.Tensor]], num_images: int) -> Prototypes:
        """Choose the prototypes of a product.

        Args:
            batches (Iterable[Sequence[torch.Tensor]]): Feature maps of each batch of its images, one for each layer,
                each of shape (B, N, dim).
            num_images (int): Images to look at, of each of which equally many patches are kept; all where there are
                not as many.

        Returns:
            Prototypes: The prototypes.

        Raises:
            RuntimeError: If the model has none.
        """
        if self.decoupler is None or self.decoupler.prior is None:
            msg = "the model has no prototypes: they need decouple=True and num_prototypes above 0"
            raise RuntimeError(msg)
        sample = sample_patches(batches, num_images, self.decoupler.num_prototypes)
        return self._prototypes_of(self.fusion(sample.features), sample.descriptors)

    @torch.no_grad()
    def score_training_images(self, product: int) -> torch.Tensor:
        """Score the images that a product's prototypes are of, each by the prototypes of the other images.

        Args:
            product (int): Index of the product.

        Returns:
            torch.Tensor: The mean of the largest twentieth of each image's energies, shape (I,): of normal images about
                alike, and larger where a defect is among them.
        """
        decoupler = cast("Decoupler", self.decoupler)
        prior = cast("PrototypePrior", decoupler.prior)
        normal, abnormal, image, descriptors = prior.of(product)
        x = decoupler.network.inverse(torch.cat([abnormal, normal], dim=-1).float())
        without, scores = prior.find_images(descriptors), []
        for number in range(len(descriptors)):
            rows = x[None, image == number]
            energy = decoupler(rows, torch.tensor([product], device=x.device), without[number : number + 1]).energy
            scores.append(energy.topk(max(energy.shape[1] // 20, 1)).values.mean())
        return torch.stack(scores)

    def _prototypes_of(self, x: torch.Tensor, descriptors: torch.Tensor) -> Prototypes:
        """Make prototypes of embeddings (I, K, dim) of images."""
        abnormal, normal = cast("Decoupler", self.decoupler).split(x)
        image = torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1])
        return Prototypes(normal.flatten(0, 1).half(), abnormal.flatten(0, 1).half(), image, descriptors)

    def _clean(self, decoupler: Decoupler, x: torch.Tensor, descriptors: torch.Tensor) -> torch.Tensor:
        """Clean embeddings (I, K, dim) of training images, in bounded memory, and measure how much that changes."""
        _, product = self.recognizer.nearest(descriptors)
        without = decoupler.prior.find_images(descriptors) if decoupler.prior is not None else None
        chunks = torch.arange(len(x), device=x.device).split(_IMAGES)
        clean = torch.cat(
            [decoupler(x[rows], product[rows], None if without is None else without[rows]).x_clean for rows in chunks]
        )
        decoupler.removed_variance.copy_((x - clean).square().mean())
        return clean

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
        if not self.is_initialized:
            msg = "the model has not been initialized: call initialize() with features of normal images first"
            raise RuntimeError(msg)
        standardized = self.standardizer(features)
        x = self.fusion(features)
        perturbed, mask = x, x.new_zeros(x.shape[:-1]).bool()
        if self.decoupler is None:
            return TrainingOutput(standardized, self.decoder(x), x, x, x.new_zeros(x.shape[:-1]), mask)
        weights = self.decoupler.fold()
        if self.synthesis is not None:
            perturbed, mask = self.synthesis(x, partial(self.decoupler.energy, weights=weights), grid)
        product, without = None, None
        if self.decoupler.prior is not None:
            descriptors = self.recognizer.describe(features)
            _, product = self.recognizer.nearest(descriptors)
            # An image that its own prototypes explained would teach the decoder what no test image shows.
            without = self.decoupler.prior.find_images(descriptors)
        x_clean, energy = self.decoupler(perturbed, product, without, weights)
        return TrainingOutput(standardized, self.decoder(x_clean), x, x_clean, energy, mask)
