# SPDX-License-Identifier: Apache-2.0
"""The products that the demo draws: a gear, a bottle cap, a connector, a woven label, and a wall of bricks.

Each function takes the side of the picture, a random generator for what differs from piece to piece, and the flaw of
this piece, and returns a :class:`scene.Surface`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

import defects
from scene import SUPERSAMPLING, Array, Surface, ground, mix, noise, place, profile, step, vector


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a piece.

    Args:
        kind (str): Its name, such as ``scratch``.
        amount (float): From 0, none, to 1.
        seed (int): Where and how it is; the same at each amount.
    """

    kind: str = ""
    amount: float = 0.0
    seed: int = 0

    def of(self, kind: str) -> float:
        """How much of this kind there is."""
        return self.amount if kind == self.kind else 0.0

    @property
    def rng(self) -> np.random.Generator:
        """A generator that starts anew."""
        return np.random.default_rng(self.seed)

    def apply(self, surface: Surface, allowed: Array | None = None) -> Surface:
        """Add a defect that any surface can have."""
        if self.amount and self.kind in defects.ANYWHERE:
            defects.ANYWHERE[self.kind](surface, self.rng, self.amount, allowed)
        return surface


def gear(size: int, rng: np.random.Generator, flaw: Flaw) -> Surface:
    """Draw a turned steel gear with 12 teeth, at any angle, on a dark mat."""
    u, v = place(size, rng, 180, 0.05, 0.02)
    surface = ground(u, v, rng, (0.055, 0.07, 0.085), 0.35)
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    teeth, root, tip = 12, 0.65, 0.84
    turn = (angle / (2 * np.pi) * teeth) % teeth
    # A broken tooth leaves a rough stump, and a bite out of the rim if it is all gone.
    missing, chance = flaw.of("missing_tooth"), flaw.rng
    broken = (np.floor(turn) == chance.integers(teeth)) * step(0, 0.2, 0.5 - np.abs(turn % 1 - 0.5))
    left = 1 - 1.4 * missing**1.4 * broken
    rough = 0.03 * min(1.0, missing * 2) * broken * noise(chance, u.shape, 0.025)
    flank = step(0.14, 0.36, 0.5 - np.abs(turn % 1 - 0.5))
    edge = root + (tip - root) * np.minimum(flank, left) + rough
    soft = 0.012
    body = step(-soft, soft, edge - radius)
    keyway = step(-soft, soft, 0.05 - np.abs(v)) * step(-soft, soft, 0.22 - u) * step(0, 0.02, u)
    bore = step(-soft, soft, radius - 0.15) * (1 - keyway)
    holes = np.ones_like(u)
    for k in range(6):
        x, y = 0.42 * np.cos(k * np.pi / 3), 0.42 * np.sin(k * np.pi / 3)
        holes *= step(-soft, soft, np.hypot(u - x, v - y) - 0.085)
    product = (body * bore * holes).astype(np.float32)
    web = step(0.27, 0.29, radius) * (1 - step(0.54, 0.56, radius))
    turned = profile(rng, radius, 260) * 0.5 + profile(rng, radius, 90) * 0.5
    surface.raise_to(0.11 - 0.035 * web + 0.0004 * turned, product)
    steel = 1 + 0.05 * turned + 0.03 * noise(rng, u.shape, 0.2) + 0.02 * noise(rng, u.shape, 0.006)
    surface.paint(product, (0.55, 0.56, 0.58), 0.35, 0.65)
    surface.albedo *= mix(1.0, steel * (1 - 0.18 * web), product)[..., None]
    surface.product = product
    return flaw.apply(surface, step(0.05, 0.06, 0.64 - radius))


@cache
def _stamp(name: str, side: int) -> Array:
    """Draw a print in the product's own coordinates once; from 0 to 1."""
    # Twice as large, and then reduced, for smooth edges.
    canvas = np.zeros((1024, 1024), np.uint8)
    if name == "cap":
        cv2.circle(canvas, (512, 512), 330, 255, 12, cv2.LINE_AA)
        cv2.circle(canvas, (512, 512), 296, 255, 5, cv2.LINE_AA)
        _text(canvas, "ALPINE", (512, 470), 3.6, 15)
        _text(canvas, "SODA", (512, 620), 3.0, 12)
        peaks = np.array([[390, 380], [465, 270], [512, 330], [570, 240], [640, 380]], np.int32)
        cv2.fillPoly(canvas, [peaks.reshape(-1, 1, 2)], 255, cv2.LINE_AA)
        for angle in np.linspace(0, 2 * np.pi, 36, endpoint=False):
            center = 512 + 313 * np.cos(angle), 512 + 313 * np.sin(angle)
            cv2.circle(canvas, (round(center[0]), round(center[1])), 6, 255, -1, cv2.LINE_AA)
    elif name == "label":
        _text(canvas, "NORD", (512, 430), 6.2, 40)
        _text(canvas, "outdoor wear", (512, 560), 2.2, 12)
        cv2.line(canvas, (250, 620), (774, 620), 255, 8, cv2.LINE_AA)
        _text(canvas, "100% COTTON   40 C", (512, 680), 1.5, 8)
    else:
        _text(canvas, "C8-24", (300, 400), 1.6, 8)
        cv2.circle(canvas, (760, 395), 18, 255, -1, cv2.LINE_AA)
    return cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _text(canvas: Array, text: str, middle: tuple[int, int], scale: float, thickness: int) -> None:
    """Write text around a point."""
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    origin = middle[0] - width // 2, middle[1] + height // 2
    cv2.putText(canvas, text, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thickness, cv2.LINE_AA)


def stamped(name: str, u: Array, v: Array) -> Array:
    """Look up a print at coordinates from -1 to 1."""
    side = 1024 if u.shape[0] > 400 else 512
    stamp = _stamp(name, side)
    columns, rows = ((axis + 1) * (side / 2) - 0.5 for axis in (u, v))
    return cv2.remap(stamp, columns.astype(np.float32), rows.astype(np.float32), cv2.INTER_LINEAR)


def printed(name: str, u: Array, v: Array, flaw: Flaw, reach: tuple[float, float]) -> Array:
    """Print something; a misprint is smeared in one place, which lies within ``reach``."""
    ink, amount, chance = stamped(name, u, v), flaw.of("misprint"), flaw.rng
    if not amount:
        return ink
    x, y = chance.uniform(-reach[0], reach[0]), chance.uniform(-reach[1], reach[1])
    distance = np.hypot(u - x, v - y) / (0.12 + 0.12 * amount) + 0.2 * noise(chance, u.shape, 0.05)
    wet = (0.4 + 0.6 * amount) * (1 - step(0.7, 1.1, distance))
    length = (0.05 + 0.09 * amount) * chance.choice((-1, 1))
    smear = sum(stamped(name, u - length * t, v - 0.35 * length * t) for t in np.linspace(0, 1, 8)) / 8
    return mix(ink, 1.15 * smear, wet).clip(0, 1)


def cap(size: int, rng: np.random.Generator, flaw: Flaw) -> Surface:
    """Draw a lacquered crown cap with a print, on a light belt."""
    u, v = place(size, rng, 25, 0.05, 0.02)
    surface = ground(u, v, rng, (0.46, 0.47, 0.46), 0.10)
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    crimps = np.cos(21 * angle)
    edge = 0.80 + 0.022 * crimps
    product = step(-0.012, 0.012, edge - radius)
    # Flat on top, round at the shoulder, crimped at the skirt.
    shoulder = np.clip((radius - 0.60) / 0.22, 0, 1)
    crown = 0.17 - 0.13 * shoulder**1.8 + 0.022 * crimps * step(0.66, 0.80, radius)
    surface.raise_to(crown + 0.0005 * noise(rng, u.shape, 0.05), product)
    hue = rng.uniform(-0.02, 0.02)
    surface.paint(product, (0.52 + hue, 0.045, 0.05), 0.75, 0.0)
    # Prints are never quite in the middle.
    dx, dy = rng.uniform(-0.012, 0.012, 2)
    ink = printed("cap", u + dx, v + dy, flaw, (0.3, 0.25)) * product
    surface.paint(ink.astype(np.float32), (0.82, 0.78, 0.66), 0.5)
    surface.albedo *= (1 + 0.02 * noise(rng, u.shape, 0.006) * product)[..., None]
    surface.product = product
    return flaw.apply(surface, step(0.05, 0.06, 0.72 - radius))


def connector(size: int, rng: np.random.Generator, flaw: Flaw) -> Surface:
    """Draw a plastic connector with eight gilt pins, in a gray tray."""
    u, v = place(size, rng, 5, 0.04, 0.02)
    surface = ground(u, v, rng, (0.36, 0.40, 0.44), 0.08)
    surface.height += 0.004 * np.cos(v * 60).astype(np.float32)
    pins, chance = 8, flaw.rng
    bent, side = int(chance.integers(pins)), chance.choice((-1, 1))
    bend = flaw.of("bent_pin") * 0.16 * side
    metal = np.zeros_like(u)
    for k in range(pins):
        # Pins leave the housing at v = 0.02; their tips lie within a tolerance.
        along = np.clip((v - 0.0) / 0.68, 0, 1)
        middle = (k - (pins - 1) / 2) * 0.17 + rng.normal(0, 0.0035) * along + (bend * along**2 if k == bent else 0)
        tip = 0.70 + rng.normal(0, 0.004) - (0.4 * abs(bend) if k == bent else 0)
        width = 0.034 * (1 - 0.45 * step(tip - 0.10, tip, v))
        across = np.abs(u - middle)
        pin = step(-0.006, 0.006, width - across) * step(-0.006, 0.006, tip - v) * step(-0.05, -0.04, v)
        round_ = np.sqrt(np.clip(1 - (across / (width + 0.004)) ** 2, 0, 1))
        surface.height = np.maximum(surface.height, (pin * (0.035 + 0.035 * round_)).astype(np.float32))
        metal = np.maximum(metal, pin)
    surface.paint(metal.astype(np.float32), (0.78, 0.58, 0.25), 0.5, 0.7)
    housing = _box(u, v + 0.36, 0.80, 0.37, 0.05)
    raised = _box(u, v + 0.10, 0.74, 0.07, 0.02)
    latch = _box(u, v + 0.52, 0.30, 0.13, 0.03)
    surface.raise_to(0.15 + 0.03 * latch + 0.02 * raised + 0.0003 * noise(rng, u.shape, 0.006), housing)
    notch = _box(u - 0.52, v + 0.50, 0.05, 0.12, 0.01) + _box(u + 0.52, v + 0.50, 0.05, 0.12, 0.01)
    surface.height -= 0.05 * notch * housing
    letters = stamped("connector", u, v) * housing
    surface.height += 0.008 * letters
    plastic = 1 + 0.06 * noise(rng, u.shape, 0.006) + 0.05 * noise(rng, u.shape, 0.15)
    surface.paint(housing, (0.05, 0.05, 0.055), 0.22)
    surface.albedo *= mix(1.0, plastic, housing)[..., None]
    surface.albedo += (0.16 * letters)[..., None]
    surface.product = np.maximum(housing, metal).astype(np.float32)
    return flaw.apply(surface, _box(u, v + 0.36, 0.70, 0.30, 0.02))


def _box(u: Array, v: Array, half_width: float, half_height: float, corner: float) -> Array:
    """Draw a rounded box around the origin; from 0 to 1."""
    x, y = np.abs(u) - half_width + corner, np.abs(v) - half_height + corner
    outside = np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0) - corner
    return step(-0.008, 0.008, -outside)


def label(size: int, rng: np.random.Generator, flaw: Flaw) -> Surface:
    """Draw a woven label, whose letters are woven in, on gray felt."""
    u, v = place(size, rng, 4, 0.04, 0.02)
    surface = ground(u, v, rng, (0.30, 0.29, 0.28), 0.35)
    # Cloth is never quite straight.
    bent_u, bent_v = u + 0.008 * noise(rng, u.shape, 0.4), v + 0.008 * noise(rng, u.shape, 0.4)
    product = _box(bent_u, bent_v, 0.84, 0.60, 0.02)
    weft, warp = np.cos(bent_v * np.pi * 52), np.cos(bent_u * np.pi * 40)
    over = weft * warp
    thread = 0.5 + 0.5 * np.abs(weft) * (0.75 + 0.25 * over)
    wear = noise(rng, u.shape, 0.006)
    surface.raise_to(0.05 + 0.007 * thread + 0.0006 * wear, product)
    surface.paint(product, (0.035, 0.06, 0.17), 0.12)
    woven = printed("label", bent_u, bent_v, flaw, (0.45, 0.12))
    frame = _box(bent_u, bent_v, 0.76, 0.51, 0.02) - _box(bent_u, bent_v, 0.735, 0.485, 0.02)
    ink = np.clip(woven + frame, 0, 1).astype(np.float32) * product
    surface.paint(ink, (0.72, 0.68, 0.56), 0.1)
    surface.height += 0.006 * ink
    shade = 1 + 0.18 * (thread - 0.7) + 0.05 * wear + 0.04 * noise(rng, u.shape, 0.3)
    surface.albedo *= mix(1.0, shade, product)[..., None]
    surface.product = product
    if amount := flaw.of("loose_thread"):
        chance = flaw.rng
        middle = defects.spot(surface, chance, 0.1)
        points = defects.curve(chance, middle, surface.unit * (0.3 + 0.4 * amount), 0.5)
        line = defects.stroke(u.shape, points, surface.unit * (0.012 + 0.018 * amount))
        surface.height += (0.01 + 0.03 * amount) * line
        surface.paint(line * (0.45 + 0.5 * amount), (0.62, 0.60, 0.55), 0.1)
    return flaw.apply(surface, _box(u, v, 0.74, 0.50, 0.02))


@cache
def _bricks() -> Array:
    """Read the photograph of a wall, as linear values."""
    import skimage.data

    return ((skimage.data.brick().astype(np.float32) / 255) ** 2.2).copy()


def brick(size: int, rng: np.random.Generator, flaw: Flaw, rows: tuple[int, int]) -> Surface:
    """Cut a square out of some rows of a photograph of bricks: the one texture that is real."""
    wall, part = _bricks(), 200
    top, left = rng.integers(rows[0], rows[1] - part + 1), rng.integers(0, wall.shape[1] - part + 1)
    square = wall[top : top + part, left : left + part]
    square = square[:, ::-1] if rng.random() < 0.5 else square
    side = size * SUPERSAMPLING
    gray = cv2.resize(np.ascontiguousarray(square), (side, side), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    line = (np.arange(side, dtype=np.float32) + 0.5) * (2 / side) - 1
    u, v = np.broadcast_to(line[None, :], (side, side)), np.broadcast_to(line[:, None], (side, side))
    flat, whole = np.zeros((side, side), np.float32), np.ones((side, side), np.float32)
    albedo = gray[..., None] * vector([1.75, 1.2, 1.0])
    return flaw.apply(Surface(u, v, flat, albedo, flat + 0.02, flat.copy(), whole))
