# SPDX-License-Identifier: Apache-2.0
"""Score images and draw heatmaps with an ONNX model; needs onnxruntime and OpenCV, neither anomalib nor torch.

usage: pip install onnxruntime opencv-python-headless
       python onnx_inference.py model.onnx image.png [more.png ...] [--output heatmaps]
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import onnxruntime


def load(model: Path):  # noqa: ANN201 - a function from a batch to named arrays
    """Load a model as a function of a float32 batch of shape (B, 3, H, W), RGB in [0, 1]."""
    session = onnxruntime.InferenceSession(str(model), providers=onnxruntime.get_available_providers())
    names = [output.name for output in session.get_outputs()]
    input_name = session.get_inputs()[0].name
    return lambda batch: dict(zip(names, session.run(None, {input_name: batch}), strict=True))


def read(path: Path) -> np.ndarray:
    """Read an image, shape (H, W, 3), BGR, 8 bit."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise SystemExit(f"{path} is no image that OpenCV can read")
    return image


def draw(image: np.ndarray, anomaly_map: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Lay the heatmap over the image, with the outline of what is above the threshold."""
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
    args = parser.parse_args()
    predict = load(args.model)
    args.output.mkdir(parents=True, exist_ok=True)
    for path in args.images:
        image = read(path)
        batch = (image[:, :, ::-1].astype(np.float32) / 255).transpose(2, 0, 1)[None]
        result = {name: value[0].squeeze() for name, value in predict(batch).items()}
        target = args.output / f"{path.stem}.png"
        cv2.imwrite(str(target), draw(image, result["anomaly_map"], result["pred_mask"]))
        verdict = "anomalous" if result["pred_label"] else "normal"
        print(f"{path}: score {float(result['pred_score']):.4f}, {verdict}, heatmap {target}")


if __name__ == "__main__":
    main()
