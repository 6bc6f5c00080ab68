# SPDX-License-Identifier: Apache-2.0
"""Small pictures of images, heatmaps and contours."""

import base64
import io
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image

__all__ = ["Picture", "contours_of", "data_uri", "draw", "heatmap"]

#: Quality of the pictures, of 100.
_QUALITY = 80

#: Contours and points of one mask: noise has thousands, which nobody can see.
_MOST_CONTOURS, _MOST_POINTS = 60, 800

#: A contour may be off by this many pixels of the picture.
_TOLERANCE = 0.6


@dataclass
class Picture:
    """What is kept of an image to show it.

    Args:
        width (int): Width in pixels.
        height (int): Height in pixels.
        image (bytes): The image as WebP.
        heat (np.ndarray | None): The anomaly map half as large, as bytes from its own smallest to its own largest
            value.
        low (float): The smallest value of the anomaly map.
        high (float): The largest.
        truth (str | None): Contours of the defects, as the path of an SVG; empty where there is none, and ``None``
            without a mask.
        found (str | None): Contours of the predicted mask, in the same way.
    """

    width: int
    height: int
    image: bytes
    heat: np.ndarray | None = None
    low: float = 0.0
    high: float = 1.0
    truth: str | None = None
    found: str | None = None


def draw(
    image: torch.Tensor,
    anomaly_map: torch.Tensor | None = None,
    truth: torch.Tensor | None = None,
    found: torch.Tensor | None = None,
    size: int = 224,
    aspect: float | None = None,
) -> Picture:
    """Make small pictures of an image and of what was predicted for it.

    Args:
        image (torch.Tensor): Shape (C, H, W) with 1, 3 or more channels, in [0, 1].
        anomaly_map (torch.Tensor | None): Any shape with one value for each pixel, the last two dimensions being height
            and width, which need not be those of the image.
        truth (torch.Tensor | None): Mask of the defects, in the same way.
        found (torch.Tensor | None): Predicted mask, in the same way.
        size (int): Longer side in pixels; a smaller image is not enlarged.
        aspect (float | None): Width over height of the picture, if not that of the image.

    Returns:
        Picture: The pictures.
    """
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    ratio, size = aspect or width / height, min(size, max(width, height))
    # A strip must not vanish.
    width, height = (size, max(round(size / ratio), 8)) if ratio >= 1 else (max(round(size * ratio), 8), size)
    shrinks = width * height < pixels.shape[0] * pixels.shape[1]
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    picture = Picture(width, height, _webp(pixels))
    if anomaly_map is not None:
        values = anomaly_map.detach().cpu().double().reshape(anomaly_map.shape[-2:]).numpy()
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        values = cv2.resize(values, _heat_size(width, height), interpolation=cv2.INTER_AREA)
        picture.low, picture.high = float(values.min()), float(values.max())
        extent = picture.high - picture.low
        scaled = (values - picture.low) / extent if extent > 0 else np.zeros_like(values)
        picture.heat = np.round(scaled * 255).astype(np.uint8)
    picture.truth = None if truth is None else contours_of(truth, width, height)
    picture.found = None if found is None else contours_of(found, width, height)
    return picture


def heatmap(picture: Picture, low: float, high: float) -> bytes | None:
    """Colour a heatmap in a scale that becomes brighter all the way, so that it needs no sense of colour.

    Args:
        picture (Picture): The picture.
        low (float): The value that is black.
        high (float): The value that is brightest.

    Returns:
        bytes | None: The heatmap as WebP, or ``None`` if there is none.
    """
    if picture.heat is None:
        return None
    values = picture.low + picture.heat.astype(np.float64) / 255 * (picture.high - picture.low)
    scaled = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    colours = cv2.applyColorMap(np.round(scaled * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    return _webp(np.ascontiguousarray(colours))


def contours_of(mask: torch.Tensor, width: int, height: int) -> str:
    """Draw the contours of a mask.

    Args:
        mask (torch.Tensor): The last two dimensions are height and width.
        width (int): Width of the picture.
        height (int): Height of the picture.

    Returns:
        str: The path of an SVG in pixels of the picture, empty where the mask is. Of a mask with very many regions the
            largest are drawn.
    """
    pixels = mask.detach().cpu().reshape(mask.shape[-2:]).bool().numpy().astype(np.uint8)
    if not pixels.any():
        return ""
    scale = np.array([width / pixels.shape[1], height / pixels.shape[0]])
    contours, _ = cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    largest = sorted(contours, key=lambda contour: cv2.contourArea(contour), reverse=True)[:_MOST_CONTOURS]
    parts: list[str] = []
    count = 0
    for contour in largest:
        points = cv2.approxPolyDP(((contour + 0.5) * scale).astype(np.float32), _TOLERANCE, closed=True)[:, 0]
        if count + len(points) > _MOST_POINTS and parts:
            break
        points, count = points[:_MOST_POINTS], count + len(points)
        parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z")
    return "".join(parts)


def data_uri(content: bytes, kind: str = "image/webp") -> str:
    """Write a file as an address that is the file itself.

    Args:
        content (bytes): The file.
        kind (str): Its media type.

    Returns:
        str: The address.
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _heat_size(width: int, height: int) -> tuple[int, int]:
    """Choose the size of a heatmap: half of a large picture's, as it is smooth."""
    factor = min(max(0.5, 64 / max(width, height)), 1.0)
    return max(round(width * factor), 1), max(round(height * factor), 1)


def _webp(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    # The method is how long the encoder tries: two thirds of the usual time for files that are as small.
    Image.fromarray(pixels).save(content, "WEBP", quality=_QUALITY, method=2)
    return content.getvalue()


def _pixels(image: torch.Tensor) -> np.ndarray:
    """Make bytes of shape (H, W, 3)."""
    pixels = image.detach().cpu().float()
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    return (pixels.nan_to_num().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
