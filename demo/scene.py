# SPDX-License-Identifier: Apache-2.0
"""Light and camera for the products that the demo draws.

A product is a height, a color and a gloss at each point. The same light and the same camera make a photograph of each,
so that a defect changes what it would change in a photograph: shading, highlights and shadows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

#: Points a pixel, along each side: edges become smooth when the picture is reduced to its size.
SUPERSAMPLING = 2

Array = np.ndarray
Color = tuple[float, float, float]


@dataclass
class Surface:
    """What is seen, before light falls on it.

    Args:
        u (Array): Coordinate along the product at each point, from -1 to 1, of shape (H, W).
        v (Array): Coordinate down the product.
        height (Array): Height above the ground, in halves of the picture's side.
        albedo (Array): Linear color (red, green, blue) of shape (H, W, 3), from 0 to 1.
        gloss (Array): How strong highlights are, from 0 to 1.
        metal (Array): How much of the surroundings is mirrored, from 0 to 1.
        product (Array): 1 where the product is, 0 on the ground.
    """

    u: Array
    v: Array
    height: Array
    albedo: Array
    gloss: Array
    metal: Array
    product: Array

    def paint(self, where: Array, color: Color, gloss: float, metal: float = 0.0) -> None:
        """Give a part its material; ``where`` is from 0 to 1."""
        self.albedo = mix(self.albedo, vector(color), where[..., None])
        self.gloss = mix(self.gloss, gloss, where)
        self.metal = mix(self.metal, metal, where)

    def raise_to(self, height: Array, where: Array) -> None:
        """Give a part its height; ``where`` is from 0 to 1."""
        self.height = mix(self.height, height, where).astype(np.float32)

    @property
    def unit(self) -> float:
        """Points from the middle of the picture to its side."""
        return self.u.shape[0] / 2


def vector(values: Any) -> Array:
    """Make an array in single precision, which all of the picture is in."""
    return np.asarray(values, np.float32)


def mix(a: Array | float, b: Array | float, share: Array | float) -> Any:
    """Go from a to b."""
    return a + (b - a) * share


def step(low: float, high: float, x: Array) -> Array:
    """Rise smoothly from 0 at ``low`` to 1 at ``high``."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return (t * t * (3 - 2 * t)).astype(np.float32)


def noise(rng: np.random.Generator, shape: tuple[int, ...], grain: float) -> Array:
    """Draw smooth noise of unit variance, whose grains have this size as a share of the picture."""
    cells = max(2, round(1 / grain) + 1)
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC) * 1.5


def profile(rng: np.random.Generator, x: Array, cells: int) -> Array:
    """Look up noise that depends on one coordinate, from 0 to 1, as brushed or turned metal has."""
    return np.interp(x, np.linspace(0, 1, cells), rng.standard_normal(cells)).astype(np.float32)


def place(size: int, rng: np.random.Generator, angle: float, shift: float, zoom: float) -> tuple[Array, Array]:
    """Lay a product down: its coordinates at each point of the picture.

    Args:
        size (int): Side of the picture in pixels.
        rng (np.random.Generator): Where chance comes from.
        angle (float): It is turned by at most this many degrees.
        shift (float): And moved by at most this share of half the side.
        zoom (float): And enlarged or reduced by at most this share.
    """
    side = size * SUPERSAMPLING
    line = (np.arange(side, dtype=np.float32) + 0.5) * (2 / side) - 1
    turn = np.deg2rad(rng.uniform(-angle, angle))
    dx, dy = rng.uniform(-shift, shift, 2)
    scale = 1 + rng.uniform(-zoom, zoom)
    x, y = line[None, :] - np.float32(dx), line[:, None] - np.float32(dy)
    cos, sin = np.float32(np.cos(turn) / scale), np.float32(np.sin(turn) / scale)
    return x * cos + y * sin, y * cos - x * sin


def ground(u: Array, v: Array, rng: np.random.Generator, color: Color, roughness: float) -> Surface:
    """Make the ground that a product lies on."""
    shape = u.shape
    grain = noise(rng, shape, 0.006) * 0.6 + noise(rng, shape, 0.03) * 0.4
    albedo = vector(color) * (1 + roughness * 0.5 * grain[..., None])
    return Surface(
        u=u,
        v=v,
        height=(roughness * 0.004 * grain).astype(np.float32),
        albedo=albedo.astype(np.float32),
        gloss=np.full(shape, 0.05, np.float32),
        metal=np.zeros(shape, np.float32),
        product=np.zeros(shape, np.float32),
    )


def light(surface: Surface, rng: np.random.Generator) -> Array:
    """Light a surface with one lamp and bright surroundings; return linear colors of shape (H, W, 3)."""
    unit = surface.unit
    azimuth, elevation = np.deg2rad(225 + rng.uniform(-20, 20)), np.deg2rad(rng.uniform(48, 58))
    lamp = vector(
        [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)]
    )  # x to the right, y down, z to the camera
    smooth = cv2.GaussianBlur(surface.height, (0, 0), 0.002 * unit + 0.4)
    dy, dx = np.gradient(smooth, 1 / unit)
    length = 1 / np.sqrt(1 + dx * dx + dy * dy)
    nx, ny, nz = -dx * length, -dy * length, length
    diffuse = np.clip(nx * lamp[0] + ny * lamp[1] + nz * lamp[2], 0, None)
    half = (lamp + vector([0, 0, 1])) / np.linalg.norm(lamp + vector([0, 0, 1]))
    glint = np.clip(nx * half[0] + ny * half[1] + nz * half[2], 0, None) ** 90
    # What a mirror sees: a ceiling that is brighter on the lamp's side, with the dark edge of the room.
    mx, my = 2 * nz * nx, 2 * nz * ny
    towards = mx * lamp[0] + my * lamp[1]
    mirrored = 0.3 + 0.75 * step(-0.55, 0.5, towards) - 0.3 * step(0.6, 0.95, np.hypot(mx, my))
    # Shadows: points below what is in the lamp's direction. Corners are darker, too.
    reach = 0.07 * unit
    moved = cv2.warpAffine(
        surface.height, vector([[1, 0, -lamp[0] * reach], [0, 1, -lamp[1] * reach]]), surface.height.shape[::-1],
        borderMode=cv2.BORDER_REPLICATE,
    )  # fmt: skip
    shadow = step(0.01, 0.09, cv2.GaussianBlur(moved, (0, 0), 0.02 * unit) - surface.height)
    corner = np.clip(cv2.GaussianBlur(surface.height, (0, 0), 0.035 * unit) - surface.height, 0, 0.12) * 4
    seen = (0.42 + 0.72 * diffuse * (1 - 0.65 * shadow)) * (1 - corner)
    colors = surface.albedo * mix(seen, mirrored * (1 - 0.5 * shadow) * (1 - corner), surface.metal)[..., None]
    return colors + (surface.gloss * glint * (1 - shadow))[..., None] * vector([1.0, 0.98, 0.94])


@dataclass
class Camera:
    """A camera's state for one photograph, drawn by chance."""

    exposure: float
    warmth: float
    blur: float
    slope: tuple[float, float]
    vignette: float
    sensor: Array

    @classmethod
    def draw(cls, rng: np.random.Generator, size: int) -> Camera:
        """Draw a camera's state."""
        return cls(
            exposure=rng.uniform(0.93, 1.07),
            warmth=rng.uniform(-0.025, 0.025),
            blur=rng.uniform(0.45, 0.75) * size / 280,
            slope=(rng.uniform(-0.06, 0.06), rng.uniform(-0.06, 0.06)),
            vignette=rng.uniform(0.14, 0.22),
            sensor=rng.standard_normal((size, size, 3)).astype(np.float32),
        )

    def expose(self, colors: Array, *, with_noise: bool = True) -> Array:
        """Photograph linear colors; return values of shape (H, W, 3) from 0 to 1."""
        size = self.sensor.shape[0]
        image = cv2.resize(colors.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
        line = np.linspace(-1, 1, size, dtype=np.float32)
        x, y = line[None, :], line[:, None]
        falloff = 1 - self.vignette * (x * x + y * y) / 2 + self.slope[0] * x + self.slope[1] * y
        image *= (self.exposure * falloff)[..., None] * vector([1 + self.warmth, 1, 1 - self.warmth])
        image = cv2.GaussianBlur(image, (0, 0), self.blur)
        if with_noise:
            # Shot noise grows with the light; both kinds are a little smooth, as after a camera's own processing.
            grain = cv2.GaussianBlur(self.sensor, (0, 0), 0.6) * 1.6
            image = image + grain * np.sqrt(np.clip(image, 0, None) * 8e-5 + 1e-5)
        image = np.clip(image, 0, None)
        # Bright values are compressed as film does, instead of cut off.
        image = np.where(image > 0.8, 0.8 + 0.2 * (1 - np.exp(-(image - 0.8) / 0.2)), image)
        return np.clip(image, 0, 1) ** (1 / 2.2)
