# SPDX-License-Identifier: Apache-2.0
"""Defects that any surface can have: scratch, dent, crack and stain, each as strong as is asked for."""

from __future__ import annotations

import cv2
import numpy as np

from scene import Array, Surface, mix, noise, step, vector

# OpenCV's lines take coordinates in units of 1 / 2^4 pixel.
_SHIFT = 4


def spot(
    surface: Surface, rng: np.random.Generator, margin: float, allowed: Array | None = None
) -> tuple[float, float]:
    """Choose a point on the product, this far from its edge if it is wide enough: column and row."""
    inside = (surface.product if allowed is None else surface.product * allowed) > 0.5
    distance = cv2.distanceTransform(np.pad(inside.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    rows, columns = np.nonzero(distance >= min(margin * surface.unit, 0.7 * distance.max()))
    index = rng.integers(len(rows))
    return float(columns[index]), float(rows[index])


def stroke(shape: tuple[int, ...], points: Array, width: float) -> Array:
    """Draw a smooth line through points; from 0 to 1."""
    canvas = np.zeros(shape, np.uint8)
    thickness = max(1, round(width))
    fixed = np.round(points * 2**_SHIFT).astype(np.int32).reshape(-1, 1, 2)
    cv2.polylines(canvas, [fixed], isClosed=False, color=255, thickness=thickness, lineType=cv2.LINE_AA, shift=_SHIFT)
    line = cv2.GaussianBlur(canvas.astype(np.float32) / 255, (0, 0), 0.5)
    # A line thinner than a pixel covers only a part of it.
    return line * min(1.0, width / thickness)


def curve(rng: np.random.Generator, start: tuple[float, float], length: float, bend: float) -> Array:
    """Draw a slightly bent curve around a point: an array of shape (N, 2)."""
    angle = rng.uniform(0, np.pi)
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    t = np.linspace(-0.5, 0.5, 24)[:, None]
    return np.array(start) + length * (t * along + rng.uniform(-bend, bend) * (1 - 4 * t * t) * across)


def scratch(surface: Surface, rng: np.random.Generator, amount: float, allowed: Array | None = None) -> None:
    """Scratch the surface with something hard: a bright groove."""
    unit = surface.unit
    middle = spot(surface, rng, 0.1, allowed)
    points = curve(rng, middle, unit * rng.uniform(0.35, 0.5) * (0.7 + 0.5 * amount), 0.12)
    line = stroke(surface.height.shape, points, unit * (0.004 + 0.014 * amount)) * surface.product
    # A scratch is not equally deep all along.
    line *= np.clip(0.8 + 0.3 * noise(rng, line.shape, 0.08), 0.3, 1)
    surface.height -= 0.006 * amount * line
    bright = vector([0.78, 0.77, 0.74])
    surface.albedo = mix(surface.albedo, bright, (0.25 + 0.65 * amount) * line[..., None])
    surface.metal = mix(surface.metal, 0.0, 0.8 * line)


def dent(surface: Surface, rng: np.random.Generator, amount: float, allowed: Array | None = None) -> None:
    """Press something round into the surface."""
    unit = surface.unit
    column, row = spot(surface, rng, 0.12, allowed)
    y, x = np.indices(surface.height.shape, dtype=np.float32)
    angle = rng.uniform(0, np.pi)
    across = (x - column) * np.cos(angle) + (y - row) * np.sin(angle)
    along = (y - row) * np.cos(angle) - (x - column) * np.sin(angle)
    radius = unit * rng.uniform(0.09, 0.12) * (0.75 + 0.4 * amount)
    distance = np.sqrt(across**2 + (along / 1.35) ** 2) / radius
    hollow = np.exp(-(distance**4)) * surface.product
    surface.height = surface.height - 0.05 * amount * hollow.astype(np.float32)
    surface.albedo = surface.albedo * (1 - 0.25 * amount * hollow.astype(np.float32))[..., None]


def crack(surface: Surface, rng: np.random.Generator, amount: float, allowed: Array | None = None) -> None:
    """Break the surface: a dark jagged line with a branch."""
    unit = surface.unit
    heading = rng.uniform(0, 2 * np.pi)
    # All of the path is drawn by chance, and a part of it taken, so that a stronger crack is the same one gone further.
    longest, steps = 26, round(12 + 14 * amount)
    turns = np.cumsum(rng.normal(0, 0.33, longest))
    side = heading + turns[4] + 0.8
    branch = np.cumsum(rng.normal([np.cos(side), np.sin(side)], 0.35, (longest // 3, 2)), axis=0) * unit * 0.024
    path = np.cumsum(np.stack([np.cos(heading + turns), np.sin(heading + turns)], axis=1) * unit * 0.028, axis=0)
    path += np.array(spot(surface, rng, 0.1, allowed)) - path[6]
    shape, width = surface.height.shape, unit * (0.006 + 0.014 * amount)
    line = stroke(shape, path[: 2 * steps // 3 + 1], width)
    line = np.maximum(line, stroke(shape, path[2 * steps // 3 : steps], 0.6 * width))
    line = np.maximum(line, stroke(shape, np.vstack([path[4:5], path[4] + branch[: steps // 3]]), 0.6 * width))
    line *= surface.product
    surface.height = surface.height - 0.02 * amount * line
    surface.albedo = surface.albedo * (1 - (0.35 + 0.55 * amount) * line)[..., None]
    surface.metal = mix(surface.metal, 0.0, line)
    surface.gloss = surface.gloss * (1 - line)


def stain(surface: Surface, rng: np.random.Generator, amount: float, allowed: Array | None = None) -> None:
    """Spill something: a brown patch with a darker rim."""
    unit = surface.unit
    column, row = spot(surface, rng, 0.15, allowed)
    y, x = np.indices(surface.height.shape, dtype=np.float32)
    radius = unit * rng.uniform(0.12, 0.16) * (0.75 + 0.4 * amount)
    distance = np.hypot(x - column, (y - row) * rng.uniform(0.85, 1.2)) / radius
    distance = distance + 0.16 * noise(rng, distance.shape, 0.09)
    wet = (1 - step(0.85, 1.0, distance)) * surface.product
    rim = np.exp(-(((distance - 0.88) / 0.09) ** 2)) * wet
    share = np.clip(0.85 * amount * wet * (0.75 + 0.12 * noise(rng, wet.shape, 0.03)) + 0.15 * amount * rim, 0, 1)
    # It darkens what is bright, and shows its own brown on what is dark.
    brown = surface.albedo * vector([0.18, 0.12, 0.06]) + vector([0.07, 0.05, 0.025])
    surface.albedo = mix(surface.albedo, brown, share[..., None])
    surface.gloss = mix(surface.gloss, 0.25, 0.5 * share)


#: The defects of this module by name.
ANYWHERE = {"scratch": scratch, "dent": dent, "crack": crack, "stain": stain}
