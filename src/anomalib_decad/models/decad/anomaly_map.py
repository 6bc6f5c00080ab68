# SPDX-License-Identifier: Apache-2.0
"""From reconstruction errors to an anomaly map and an image score."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from anomalib.models.components import GaussianBlur2d
from torch import nn
from torch.nn import functional

from anomalib_decad.components.decoder import patch_errors
from anomalib_decad.ranges import check_range

__all__ = ["AnomalyMapGenerator", "AnomalyMapOptions"]


@dataclass(frozen=True)
class AnomalyMapOptions:
    """How errors become an anomaly map and a score.

    Args:
        blur_sigma (float): Standard deviation of the blur of anomaly maps, in pixels; 0 for none.
            Defaults to ``2.0``.
        score_fraction (float): Share of an anomaly map's pixels, the largest, whose mean is the image score, in (0, 1].
            Defaults to ``0.003``.
        energy_power (float): Exponent of the abnormal energy, whose power multiplies the reconstruction error, not
            negative; 0 leaves it out.
            Defaults to ``0.125``.

    Raises:
        ValueError: If a value is out of its range.
    """

    blur_sigma: float = 2.0
    score_fraction: float = 0.003
    energy_power: float = 0.125

    def __post_init__(self) -> None:
        check_range(self.blur_sigma >= 0, "blur_sigma", "at least 0", self.blur_sigma)
        check_range(0 < self.score_fraction <= 1, "score_fraction", "in (0, 1]", self.score_fraction)
        check_range(self.energy_power >= 0, "energy_power", "at least 0", self.energy_power)


class AnomalyMapGenerator(nn.Module):
    """Turns reconstructed feature maps into an anomaly map and a score for each image.

    The error of a patch is the mean over the layers of 1 - cosine similarity between a feature map and its
    reconstruction, times a power of the abnormal energy H that was removed. Brought to the size of the image bilinearly
    and blurred, the errors are the map. The score is the mean of the largest values of the map.

    Measured (``benchmarks/NOTES.md``, "Anomaly map and image score"): the energy helps before a training and early in
    it and harms later, so its exponent is small. A small defect is one or two patches, so the score is of few pixels
    and the blur is narrow.

    Bilinear interpolation and the Gaussian blur are linear and separable, so both together are one small matrix for
    each axis, applied to the errors of the patches: the same map as that of a blur at full resolution.

    Args:
        options (AnomalyMapOptions): Blur, score and exponent of the energy.
    """

    _rows: torch.Tensor | None
    _columns: torch.Tensor | None

    def __init__(self, options: AnomalyMapOptions = AnomalyMapOptions()) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("_rows", None)
        self.register_buffer("_columns", None)

    def fuse(self, grid: tuple[int, int], image_size: tuple[int, int]) -> None:
        """Compute the interpolation of one size once and for all, in place, for inference.

        Args:
            grid (tuple[int, int]): Patch rows and columns.
            image_size (tuple[int, int]): Height and width of the maps in pixels.
        """
        errors = torch.zeros(())
        self._rows, self._columns = (self._interpolation(errors, *side) for side in zip(grid, image_size, strict=True))

    def forward(
        self,
        features: Sequence[torch.Tensor],
        reconstructions: Sequence[torch.Tensor],
        grid: tuple[int, int],
        image_size: tuple[int, int],
        energy: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute anomaly maps and scores.

        Args:
            features (Sequence[torch.Tensor]): Feature maps of shape (B, N, dim).
            reconstructions (Sequence[torch.Tensor]): Their reconstructions, same shapes.
            grid (tuple[int, int]): Patch rows and columns, N = rows * columns.
            image_size (tuple[int, int]): Height and width of the maps in pixels.
            energy (torch.Tensor): Abnormal energies of the patches, shape (B, N), not negative.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Maps of shape (B, 1, height, width) and scores of shape (B,), neither
                negative.
        """
        # In float32 also under automatic mixed precision: bfloat16 has too few digits for ranks.
        with torch.autocast(features[0].device.type, enabled=False):
            errors = patch_errors(features, reconstructions)
            if self.options.energy_power:
                errors = errors * energy.float().pow(self.options.energy_power)
            return self.maps_and_scores(errors, grid, image_size)

    def maps_and_scores(
        self, errors: torch.Tensor, grid: tuple[int, int], image_size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bring errors (B, N) of patches to the size of the image, blur and score them, see :meth:`forward`."""
        patches = errors.unflatten(1, grid).unsqueeze(1)
        rows, columns = self._rows, self._columns
        if rows is None or columns is None:
            rows, columns = (self._interpolation(patches, *side) for side in zip(grid, image_size, strict=True))
        maps = rows @ patches @ columns.T
        count = max(round(self.options.score_fraction * image_size[0] * image_size[1]), 1)
        return maps, maps.flatten(1).topk(count, dim=1).values.mean(1)

    def _interpolation(self, like: torch.Tensor, num_patches: int, size: int) -> torch.Tensor:
        """Compute the matrix of interpolation and blur along one axis, shape (size, num_patches)."""
        patches = torch.eye(num_patches, dtype=like.dtype, device=like.device)[None, None]
        pixels = functional.interpolate(patches, size=(size, num_patches), mode="bilinear", align_corners=False)
        if self.options.blur_sigma:
            kernel_size = 2 * int(4 * self.options.blur_sigma + 0.5) + 1
            blur = GaussianBlur2d(self.options.blur_sigma, kernel_size=(kernel_size, 1), border_type="replicate")
            pixels = blur.to(pixels)(pixels)
        return pixels[0, 0]
