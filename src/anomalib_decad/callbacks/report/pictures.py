# SPDX-License-Identifier: Apache-2.0
"""Small pictures of images, heatmaps and contours."""

import base64
import contextlib
import io
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from anomalib.data.transforms.utils import extract_transforms_by_type
from lightning.pytorch import LightningModule
from PIL import Image
from torchvision.transforms.v2 import Normalize

from anomalib_decad.callbacks.base import sees_whole_images

__all__ = ["Picture", "draw", "heatmap"]

#: A mask of noise has thousands of contours and points, which nobody can see.
_MAX_CONTOURS, _MAX_POINTS = 60, 800


@dataclass
class Picture:
    """What is kept of an image to show it."""

    size: tuple[int, int]  # width and height
    image: str  # a data URI
    heat: np.ndarray | None = None  # anomaly map of half the size, float16
    truth: str | None = None  # contours of the defects as an SVG path, empty for an empty mask; None without a mask
    found: str | None = None  # contours of the predicted mask


def draw(pl_module: LightningModule, batch: Any, index: int, size: int, with_found: bool = True) -> Picture:
    """Make small pictures of an image of a batch, in the colors and with the proportions of its file.

    Args:
        pl_module (LightningModule): The model. If its pre-processor crops, the proportions are those of the crop.
        batch (Any): Batch with images (B, C, H, W), and maybe ``anomaly_map``, ``gt_mask`` and ``pred_mask``, whose
            height and width may differ, and ``image_path``.
        index (int): Place in the batch, in [0, B).
        size (int): Longer side in pixels; a smaller image is not enlarged.
        with_found (bool): Whether the predicted mask means anything. Defaults to ``True``.

    Returns:
        Picture: The pictures.
    """
    fields = (getattr(batch, name, None) for name in ("anomaly_map", "gt_mask", "pred_mask"))
    heat, truth, found = (None if field is None else field[index].detach().cpu() for field in fields)
    pixels = _original_colors(pl_module, batch.image[index].detach().cpu().float())
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    array = (pixels.nan_to_num().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    size, ratio = min(size, max(array.shape)), array.shape[1] / array.shape[0]
    path = (getattr(batch, "image_path", None) or {index: None})[index]
    if path and sees_whole_images(pl_module):
        with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError), Image.open(path) as file:
            ratio = min(max(file.width / file.height, 0.25), 4.0)
    shape = max(round(size * min(ratio, 1)), 8), max(round(size / max(ratio, 1)), 8)
    array = cv2.resize(array, shape, interpolation=cv2.INTER_AREA)
    picture = Picture(shape, _webp(array))
    if heat is not None:
        # Heatmaps are smooth: half the size is enough.
        values = heat.float().reshape(heat.shape[-2:]).nan_to_num(0, 0, 0).clamp(-6e4, 6e4).numpy()
        half = max(shape[0] // 2, 8), max(shape[1] // 2, 8)
        picture.heat = cv2.resize(values, half, interpolation=cv2.INTER_AREA).astype(np.float16)
    picture.truth = None if truth is None else _contours(truth, shape)
    picture.found = None if found is None or not with_found else _contours(found, shape)
    return picture


def heatmap(heat: np.ndarray, low: float, high: float) -> str:
    """Color an anomaly map of shape (h, w), black at ``low`` and brightest at ``high``, and give it as a data URI."""
    scaled = np.clip((heat.astype(np.float32) - low) / max(high - low, 1e-12), 0, 1)
    colors = cv2.applyColorMap(np.round(scaled * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return _webp(np.ascontiguousarray(colors[..., ::-1]))


def _contours(mask: torch.Tensor, size: tuple[int, int]) -> str:
    """Trace the contours of a mask, of very many regions the largest, as an SVG path in pixels of the picture."""
    pixels = mask.reshape(mask.shape[-2:]).bool().numpy().astype(np.uint8)
    scale = np.array(size) / pixels.shape[::-1]
    contours, _ = cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    path, count = "", 0
    for contour in sorted(contours, key=cv2.contourArea, reverse=True)[:_MAX_CONTOURS]:
        points = cv2.approxPolyDP(((contour + 0.5) * scale).astype(np.float32), 0.6, closed=True)[:, 0]
        points, count = points[: _MAX_POINTS - count], count + len(points)
        if len(points):
            path += "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z"
    return path


def _original_colors(pl_module: LightningModule, image: torch.Tensor) -> torch.Tensor:
    """Undo the normalization of the pre-processor. What is of an unknown kind is stretched to [0, 1]."""
    transform = getattr(getattr(pl_module, "pre_processor", None), "transform", None)
    for step in extract_transforms_by_type(transform, Normalize):
        if len(step.mean) == len(image):
            mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (step.mean, step.std))
            return image * std + mean
    low, high = image.aminmax()
    return (image - low) / (high - low).clamp(min=1e-12) if low < 0 or high > 1 else image


def _webp(pixels: np.ndarray) -> str:
    content = io.BytesIO()
    # Method 2 takes two thirds of the default's time, for files of the same size.
    Image.fromarray(pixels).save(content, "WEBP", quality=80, method=2)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
