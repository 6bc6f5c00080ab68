# SPDX-License-Identifier: Apache-2.0
"""Pre-processing in exported models that gives the scores of the checkpoint."""

import copy
import logging

import torch
from anomalib.pre_processing import PreProcessor
from torch import nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Resize, Transform

__all__ = ["MatrixResize", "for_export"]

logger = logging.getLogger(__name__)


class MatrixResize(nn.Module):
    """Antialiased bilinear resizing as two products with matrices.

    The same as torchvision's ``Resize``, but of operations that every runtime has: OpenVINO 2026.4 ignores the
    antialiasing of ONNX's Resize.

    Args:
        size (tuple[int, int]): Height and width of the result in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize floating-point images of shape (..., H, W) to ``(..., *size)``."""
        height, width = images.shape[-2:]
        # Exporters give symbols for sizes that stay open; comparing these would fix them.
        if isinstance(height, int) and isinstance(width, int) and (height, width) == self.size:
            return images
        rows, columns = self._matrix(images, height, self.size[0]), self._matrix(images, width, self.size[1])
        # Not rows @ images @ columns.T: OpenVINO 2026.4 fails to fuse a product and a Normalize after it.
        return (columns @ (rows @ images).mT).mT

    @staticmethod
    def _matrix(like: torch.Tensor, source: int, target: int) -> torch.Tensor:
        """Compute the weights of the source pixels in each target pixel, shape (target, source)."""
        # A triangle around the center of each target pixel, as wide as the larger of a target and a source pixel. In
        # integers, because runtimes may compute floating-point numbers in half precision, which does not even hold
        # the number of each pixel.
        centers = (2 * torch.arange(target, device=like.device) + 1) * source
        pixels = (2 * torch.arange(source, device=like.device) + 1) * target
        width = 2 * torch.sym_max(source, target)
        weights = (pixels - centers[:, None]).abs().neg().add(width).clamp(min=0)
        return weights.to(like.dtype) / weights.sum(dim=1, keepdim=True).to(like.dtype)


def for_export(pre_processor: PreProcessor, native: bool = False) -> PreProcessor:
    """Copy a pre-processor so that exports resize as training and ``Engine.predict`` do.

    anomalib switches antialiasing off in what is exported: images larger than the model's input then get other scores
    than from the checkpoint.

    Args:
        pre_processor (PreProcessor): Any of anomalib's pre-processors.
        native (bool): Whether the export will run in torch, which has a faster antialiased resizing.
            Defaults to ``False``.

    Returns:
        PreProcessor: The copy.
    """
    copied = copy.deepcopy(pre_processor)
    if copied.transform is not None and copied.export_transform is not None:
        copied.export_transform = _with_antialiasing(copied.transform, copied.export_transform, native)
    return copied


def _with_antialiasing(transform: Transform, exported: Transform, native: bool) -> nn.Module:
    if isinstance(transform, Compose) and isinstance(exported, Compose):
        pairs = zip(transform.transforms, exported.transforms, strict=True)
        return nn.Sequential(*(_with_antialiasing(inner, inner_exported, native) for inner, inner_exported in pairs))
    if not (isinstance(transform, Resize) and transform.antialias):
        return exported
    if native:
        return transform
    # torchvision takes the mode itself, its name or Pillow's number, and keeps what it was given.
    bilinear = transform.interpolation in {InterpolationMode.BILINEAR, "bilinear", 2}
    if bilinear and transform.size and len(transform.size) == 2:
        return MatrixResize((transform.size[0], transform.size[1]))
    logger.warning(
        "The export resizes without antialiasing, and scores of larger images will differ from the checkpoint's: only "
        "bilinear Resize transforms to a height and a width are exported with it, not %s.",
        transform,
    )
    return exported
