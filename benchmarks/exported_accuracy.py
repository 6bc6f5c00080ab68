# SPDX-License-Identifier: Apache-2.0
"""What exporting does to accuracy: the seven metrics of exported files beside those of the checkpoint.

usage: python benchmarks/exported_accuracy.py CHECKPOINT --data ROOT [--categories a b] [--formats torch onnx ...]

ROOT is a folder in MVTec AD's layout. Scores and maps are compared as they come, that is after normalization to
[0, 1], but only the order matters for the metrics.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.deploy import CompressionType
from torch.nn import functional
from tqdm import tqdm

import common
from anomalib_decad import DecAD, MultiCategory
from anomalib_decad.metrics import CategoryMetrics
from inference import load

FORMATS = ("torch", "onnx", "openvino", "openvino-fp16", "openvino-default", "openvino-int8")


def export(model: DecAD, kind: str, folder: Path, datamodule: MultiCategory) -> Path:
    """Export for images of any size."""
    if kind == "torch":
        return model.to_torch(folder / kind)
    if kind == "onnx":
        return model.to_onnx(folder / kind)
    compression = {"openvino-fp16": CompressionType.FP16, "openvino-int8": CompressionType.INT8_PTQ}.get(kind)
    return model.to_openvino(folder / kind, compression_type=compression, datamodule=datamodule)


def outputs(prediction: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Get score and map from what a runtime returns."""
    if hasattr(prediction, "pred_score"):
        return prediction.pred_score.flatten(), prediction.anomaly_map[0, 0]
    if isinstance(prediction, list):  # onnxruntime, in the order of InferenceBatch
        prediction = dict(zip(("pred_score", "pred_label", "anomaly_map", "pred_mask"), prediction, strict=True))
    else:
        prediction = {next(iter(key.names)): value for key, value in prediction.items()}
    return (
        torch.from_numpy(np.ravel(prediction["pred_score"])),
        torch.from_numpy(np.asarray(prediction["anomaly_map"])[0, 0]),
    )


def main() -> None:
    """Export, predict the test images with each file, and print a Markdown table."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--every", type=int, default=1, help="take every n-th test image only")
    args = parser.parse_args()
    torch.set_grad_enabled(False)

    common.check_data(args)
    datamodule = common.datamodule(args)
    datamodule.setup()
    model = DecAD.load_from_checkpoint(args.checkpoint).eval()
    transform, post_processor = model.pre_processor.transform, model.post_processor
    predictors: dict[str, Callable[[Any], Any]] = {
        "checkpoint": lambda image: post_processor(model.model(transform(torch.from_numpy(image))))
    }
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.formats:
            path = export(model, kind, Path(folder), datamodule)
            predictors[kind] = load(path, kind)
        metrics = {name: CategoryMetrics() for name in predictors}
        errors: dict[str, list[tuple[float, float]]] = {name: [] for name in predictors}
        for index in tqdm(range(0, len(datamodule.test_data), args.every), "Predicting"):
            item: Any = datamodule.test_data[index]
            image = item.image[None].numpy()
            reference: tuple[torch.Tensor, torch.Tensor] | None = None
            for name, predictor in predictors.items():
                score, map_ = outputs(predictor(image))
                reference = reference or (score, map_)
                mask = functional.interpolate(item.gt_mask[None, None].float(), size=map_.shape[-2:])[0]
                metrics[name].update([item.category], score, torch.as_tensor(item.gt_label)[None], map_[None], mask)
                relative = [((a - b).norm() / b.norm()).item() for a, b in zip((score, map_), reference, strict=True)]
                errors[name].append((relative[0], relative[1]))

    print("| | image AUROC | pixel AUROC | AUPRO | mAD | score error | map error |")
    print("|---" * 7 + "|")
    for name, metric in metrics.items():
        row = metric.compute()["mean"]
        values = [row["image_AUROC"], row["pixel_AUROC"], row["pixel_AUPRO"], row["mAD"]]
        worst = np.max(errors[name], axis=0)
        print(f"| {name} | " + " | ".join(f"{100 * value:.2f}" for value in values), end="")
        print(f" | {worst[0]:.1e} | {worst[1]:.1e} |")


if __name__ == "__main__":
    main()
