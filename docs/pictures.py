# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of the documents: the strip of heatmaps, and how the model is built.

usage: python docs/pictures.py --model MODEL.ckpt    after `make demo`, whose model it takes by default
       python docs/pictures.py --only-architecture

The products are drawn by demo/products.py, so that the pictures can be given away with the project.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np

from anomalib_decad.models.decad import AnomalyMapOptions

DOCS = Path(__file__).resolve().parent
sys.path.append(str(DOCS.parent / "demo"))

#: What the strip shows: product, defect, strength, number of the piece.
STRIP = (
    ("gear", "missing_tooth", "medium", 51),
    ("cap", "scratch", "medium", 57),
    ("connector", "bent_pin", "strong", 53),
    ("label", "loose_thread", "medium", 55),
)
_TILE, _GAP = 280, 6
_INK, _GRAY, _BLUE, _ORANGE, _GREEN = "#1b2733", "#5b6b7a", "#dbe9f8", "#fde3cf", "#dff2df"


def strip(model_path: Path, target: Path) -> None:
    """Draw products above their heatmaps; the true defect has a white outline."""
    from anomalib.data import PredictDataset
    from anomalib.engine import Engine

    from anomalib_decad import DecAD
    from products import draw, write

    model = DecAD.load_from_checkpoint(model_path, visualizer=False)
    columns = []
    with TemporaryDirectory() as folder:
        for product, kind, strength, number in STRIP:
            drawing = draw(product, number, kind=kind, strength=strength, size=_TILE)
            file = Path(folder) / f"{product}.png"
            write(file, drawing.image)
            engine = Engine(logger=False, enable_progress_bar=False, default_root_dir=folder)
            predicted: Any = engine.predict(model, dataset=PredictDataset(file))
            (batch,) = predicted
            heat = cv2.resize(batch.anomaly_map.squeeze().float().numpy(), (_TILE, _TILE))
            columns.append(np.vstack([drawing.image, _gap(_TILE), overlay(drawing.image, heat, drawing.mask)]))
    separated = [part for column in columns for part in (column, _gap(_GAP, 2 * _TILE + _GAP))][:-1]
    write_jpeg(target, np.hstack(separated))


def _gap(width: int, height: int = _GAP) -> np.ndarray:
    """Make a piece of white."""
    return np.full((height, width, 3), 255, np.uint8)


def overlay(image: np.ndarray, heat: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Lay a map, in which 0.5 is the threshold, over an image, and outline what is really defective."""
    # Below a quarter nothing is drawn, so that what is normal keeps its own colors.
    strength = np.clip((heat - 0.25) / 0.5, 0, 1)[..., None].astype(np.float32)
    colors = cv2.applyColorMap((np.clip(heat, 0, 1) * 255).astype(np.uint8), cv2.COLORMAP_JET)[..., ::-1]
    gray = image.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.75 + 30
    picture = (gray * (1 - 0.75 * strength) + colors * 0.75 * strength).clip(0, 255).astype(np.uint8)
    outlines, _ = cv2.findContours((mask > 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.ascontiguousarray(picture), outlines, -1, (255, 255, 255), 1, cv2.LINE_AA)


def write_jpeg(path: Path, image: np.ndarray) -> None:
    """Write a picture in a form that is small."""
    if not cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88]):
        msg = f"cannot write {path}"
        raise OSError(msg)


def _box(x: int, y: int, width: int, lines: tuple[str, ...], fill: str, height: int = 74) -> str:
    """Draw a box; its first line is its name."""
    middle, top = x + width / 2, y + height / 2 - 9 * (len(lines) - 1) + 5
    texts = [
        f'<text x="{middle}" y="{top + 18 * index}" class="{"small" if index else "name"}">{line}</text>'
        for index, line in enumerate(lines)
    ]
    rect = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{_GRAY}"/>'
    return "\n".join([rect, *texts])


def _arrow(*points: tuple[int, int], label: str = "", at: tuple[int, int] = (0, 0)) -> str:
    """Draw an arrow through points."""
    path = " ".join(f"{x},{y}" for x, y in points)
    line = f'<polyline points="{path}" fill="none" stroke="{_INK}" stroke-width="1.6" marker-end="url(#tip)"/>'
    return line + (f'\n<text x="{at[0]}" y="{at[1]}" class="small">{label}</text>' if label else "")


def architecture() -> str:
    """Draw the way of an image through the model, as SVG with a background of its own."""
    z_a, z_n = "z<tspan dy='4' font-size='10'>a</tspan>", "z<tspan dy='4' font-size='10'>n</tspan>"
    reset = "<tspan dy='-4'>&#8203;</tspan>"
    parts = [
        _box(20, 40, 100, ("image", "280 x 280"), "#ffffff"),
        _box(160, 40, 160, ("frozen encoder", "DINOv2, layers 3, 6, 9"), _BLUE),
        _box(370, 40, 140, ("fusion", "mean, whitened"), _GREEN),
        _box(560, 40, 130, ("F", "invertible, each", "patch by itself"), _GREEN),
        _box(750, 20, 190, (f"{z_a}{reset}: abnormal, 9/10",), _ORANGE, 44),
        _box(750, 90, 190, (f"{z_n}{reset}: normal, 1/10",), _BLUE, 44),
        _box(750, 190, 190, ("prior", f"{z_a}{reset} of a normal patch"), _GREEN),
        _box(560, 190, 130, ("F inverse", "the cleaned", "embedding"), _GREEN),
        _box(370, 190, 140, ("decoder", "transformer blocks"), _GREEN),
        _box(160, 190, 160, ("error", "layers, reconstructed?"), "#ffffff"),
        _box(160, 320, 160, ("map", f"error x energy^{AnomalyMapOptions().energy_power:g}"), _ORANGE),
        _arrow((120, 77), (160, 77)),
        _arrow((320, 77), (370, 77)),
        _arrow((510, 77), (560, 77)),
        _arrow((690, 66), (750, 42)),
        _arrow((690, 88), (750, 112)),
        _arrow((845, 134), (845, 190)),
        _arrow((750, 240), (690, 240)),
        _arrow((750, 124), (720, 140), (720, 212), (690, 212), label=f"{z_n}{reset}", at=(708, 180)),
        _arrow((560, 227), (510, 227)),
        _arrow((370, 227), (320, 227)),
        _arrow((240, 114), (240, 190), label="the layers", at=(280, 156)),
        _arrow((240, 264), (240, 320)),
        _arrow((625, 264), (625, 357), (320, 357), label="energy: how much removal takes", at=(473, 348)),
    ]
    style = (
        f"text {{ font-family: Helvetica, Arial, sans-serif; text-anchor: middle; fill: {_INK}; }} "
        ".name { font-size: 15px; font-weight: bold; } .small { font-size: 13px; }"
    )
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 414" role="img" '
            'aria-label="The way of an image through DecAD">',
            f"<style>{style}</style>",
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M 0 0 L 10 5 L 0 10 z" fill="{_INK}"/></marker></defs>',
            '<rect width="1000" height="414" rx="10" fill="#f7f9fb"/>',
            *parts,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo_model = Path("demo-output/results/DecAD/products/latest/weights/lightning/model.ckpt")
    parser.add_argument("--model", type=Path, default=demo_model, help="checkpoint (default: the demo's)")
    parser.add_argument("--only-architecture", action="store_true", help="leave out the strip, which needs a model")
    arguments = parser.parse_args()
    (DOCS / "images").mkdir(exist_ok=True)
    (DOCS / "images" / "architecture.svg").write_text(architecture(), encoding="utf-8")
    if not arguments.only_architecture:
        strip(arguments.model, DOCS / "images" / "heatmaps.jpg")


if __name__ == "__main__":
    main()
