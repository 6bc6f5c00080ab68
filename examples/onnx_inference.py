# SPDX-License-Identifier: Apache-2.0
"""Score images and draw heatmaps with an ONNX model; needs onnxruntime and OpenCV, neither anomalib nor torch.

usage: pip install onnxruntime opencv-python-headless
       python onnx_inference.py model.onnx image.png [more.png ...] [--output heatmaps]

Thresholds are read from model.thresholds.json beside the model, which may be edited: a higher one flags less. Those of
single products need a model that was exported with the output "category", or --category.
"""

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

# How complete files end that begin so.
ENDINGS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND"}
# Where the model has no file of thresholds.
NONE = {"unit": "normalized", "image": 0.5, "pixel": 0.5, "categories": []}


def load(model: Path):  # noqa: ANN201 - a function from a batch to named arrays
    """Load a model as a function of a float32 batch of shape (B, 3, H, W), RGB in [0, 1]."""
    session = onnxruntime.InferenceSession(str(model), providers=onnxruntime.get_available_providers())
    names = [output.name for output in session.get_outputs()]
    input_name = session.get_inputs()[0].name
    return lambda batch: dict(zip(names, session.run(None, {input_name: batch}), strict=True))


def read(path: Path) -> np.ndarray | None:
    """Read an image, shape (H, W, 3), BGR, of as many bits as the file has; None if it is no whole image."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    # OpenCV makes up what is missing of a file.
    ending = next((end for start, end in ENDINGS.items() if content.startswith(start)), b"")
    if not content or ending not in content[-4096:]:
        return None
    # As in training: the pixels as they are stored, whatever orientation a camera has noted.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.imdecode(np.frombuffer(content, np.uint8), flags)


def white_level_of(paths: list[Path], bits: int | None) -> float:
    """Find the value of white in images of more than 8 bits: of all, as a dark image must stay dark."""
    if bits:
        return 2.0**bits - 1
    images = (image for image in map(read, paths) if image is not None and image.dtype != np.uint8)
    largest = max((float(image.max()) for image in images), default=0)
    if 0 < largest <= 1:
        return 1.0  # fractions
    return next((white for white in (255.0, 1023.0, 4095.0, 65535.0) if largest <= white), largest)


def read_thresholds(model: Path) -> dict:
    """Read the thresholds beside a model; 0.5 for all if there are none."""
    path = model.with_suffix(".thresholds.json")
    if not path.is_file():
        return NONE
    try:
        thresholds = {"unit": "normalized", **json.loads(path.read_text(encoding="utf-8-sig"))}
        for number, row in enumerate(thresholds["categories"]):
            row.setdefault("index", number)  # a file of before has all in their order
            if not isinstance(row["name"], str):
                raise ValueError(f"a category is called {row['name']}")
        for row in (thresholds, *thresholds["categories"]):
            for kind in ("image", "pixel"):
                if row[kind] is None and thresholds["unit"] == "raw":
                    continue  # exported without thresholds
                row[kind] = float(row[kind])
                if not np.isfinite(row[kind]) or (thresholds["unit"] != "raw" and not 0 <= row[kind] <= 1):
                    raise ValueError(f"{kind} is {row[kind]}, no score")
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise SystemExit(f"{path} has no thresholds of an export ({error}): correct it, or export again") from None
    return thresholds


def choose(thresholds: dict, index: int | None, name: str | None) -> tuple[str, float | None, float | None]:
    """Choose the product of an image, by its index or name, and its thresholds for scores and for maps, if any."""
    products = thresholds["categories"]
    if name is not None:
        found = [product for product in products if product["name"] == name]
        if not found:
            raise SystemExit(f"no thresholds of {name!r}: there are {', '.join(p['name'] for p in products) or 'none'}")
        return name, found[0]["image"], found[0]["pixel"]
    if index is None and len(products) == 1:
        index = products[0]["index"]  # a model of one product
    found = [product for product in products if product["index"] == index]
    if found:
        return found[0]["name"], found[0]["image"], found[0]["pixel"]
    if index is not None and index >= 0:
        raise SystemExit(f"no thresholds of the product with index {index}: put its row back, or export again")
    if index is None and any(p["image"] != thresholds["image"] or p["pixel"] != thresholds["pixel"] for p in products):
        raise SystemExit(
            "the thresholds of products differ, but the model does not say which product an image shows: export it "
            "with the output category (see docs/decisions.md), or give --category"
        )
    return "unknown" if index is not None else "", thresholds["image"], thresholds["pixel"]


def free_name(folder: Path, stem: str, written: set[Path]) -> Path:
    """Name a picture as its image; equally named images of several folders get numbers."""
    number, target = 2, folder / f"{stem}.png"
    while target in written:
        number, target = number + 1, folder / f"{stem}_{number}.png"
    written.add(target)
    return target


def draw(image: np.ndarray, anomaly_map: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Lay the heatmap over the image, of values in [0, 1], with the outline of what is above the threshold."""
    image = (image * 255).round().astype(np.uint8)
    size = image.shape[1], image.shape[0]
    heat = cv2.applyColorMap((cv2.resize(anomaly_map, size).clip(0, 1) * 255).astype(np.uint8), cv2.COLORMAP_JET)
    picture = cv2.addWeighted(image, 0.6, heat, 0.4, 0)
    mask = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return cv2.drawContours(picture, outlines, -1, (0, 0, 255), 1)


def main() -> None:
    """Score the images of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("heatmaps"))
    parser.add_argument("--category", help="the product of all images; else the model says it, if it can")
    parser.add_argument("--bits", type=int, help="of images with more than 8; else by their largest value")
    args = parser.parse_args()
    predict = load(args.model)
    thresholds = read_thresholds(args.model)
    args.output.mkdir(parents=True, exist_ok=True)
    white = white_level_of(args.images, args.bits)
    skipped: list[str] = []
    written: set[Path] = set()
    for path in args.images:
        image = read(path)
        if image is None:
            skipped.append(str(path))
            continue
        image = (image.astype(np.float32) / (255 if image.dtype == np.uint8 else white)).clip(0, 1)
        batch = np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1)[None])
        result = {name: value[0].squeeze() for name, value in predict(batch).items()}
        index = int(result["category"]) if "category" in result else None
        product, image_threshold, pixel_threshold = choose(thresholds, index, args.category)
        target = free_name(args.output, path.stem, written)
        anomaly_map = result["anomaly_map"]
        mask = anomaly_map > (np.inf if pixel_threshold is None else pixel_threshold)
        if thresholds["unit"] == "raw":  # with the threshold in the middle of the colours
            anomaly_map = anomaly_map / (2 * pixel_threshold if pixel_threshold else max(anomaly_map.max(), 1e-12))
        cv2.imwrite(str(target), draw(image, anomaly_map, mask))
        verdict = "without a threshold"
        if image_threshold is not None:
            verdict = "normal" if result["pred_score"] <= image_threshold else "anomalous"  # as NaN is
        what = f"{product}, " if product else ""
        print(f"{path}: {what}score {float(result['pred_score']):.4f}, {verdict}, heatmap {target}")
    if skipped:
        print(f"Skipped {len(skipped)} files that are no images, or incomplete: {', '.join(skipped)}", file=sys.stderr)
    if len(skipped) == len(args.images):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
