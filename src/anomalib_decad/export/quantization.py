# SPDX-License-Identifier: Apache-2.0
"""Quantization of exported OpenVINO models to 8-bit integers by NNCF.

What anomalib does for ``INT8`` and ``INT8_PTQ``, but with the parts that the model declares left in floating point, and
calibrated on training images instead of test images.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from torchvision.transforms.v2.functional import resize

__all__ = ["quantize"]

# NNCF's own default, beyond which statistics hardly change.
_CALIBRATION_IMAGES = 300


def quantize(
    model: Any, kind: CompressionType, keep_in_float32: Sequence[str], datamodule: AnomalibDataModule | None = None
) -> Any:
    """Quantize an exported model: its weights (INT8), or also what encoder and decoder compute with them (INT8_PTQ).

    Args:
        model (openvino.Model): The exported model.
        kind (CompressionType): ``INT8`` or ``INT8_PTQ``.
        keep_in_float32 (Sequence[str]): Names of the submodules that stay in floating point.
        datamodule (AnomalibDataModule | None): For INT8_PTQ: its training images give the ranges of the activations.

    Returns:
        openvino.Model: The quantized model.

    Raises:
        RuntimeError: If the graph has no weight of one of the parts.
    """
    import nncf

    precise = _operations_of(model, keep_in_float32)
    if kind == CompressionType.INT8:
        return nncf.compress_weights(model, ignored_scope=nncf.IgnoredScope(names=sorted(precise), validate=False))
    data = cast("AnomalibDataModule", datamodule)
    data.setup("fit")
    size, images = _static_size(model), data.train_data
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:_CALIBRATION_IMAGES]

    def read(index: int) -> Any:
        """Give an image as an array of shape (1, 3, H, W)."""
        image = cast("torch.Tensor", images[index].image)
        return (resize(image, list(size), antialias=True) if size else image)[None].numpy()

    return nncf.quantize(
        model,
        nncf.Dataset(order.tolist(), read),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=_CALIBRATION_IMAGES,
        ignored_scope=nncf.IgnoredScope(names=sorted({*precise, *_other_operations(model, precise)}), validate=False),
    )


def _operations_of(model: Any, keep_in_float32: Sequence[str]) -> set[str]:
    """Name the operations that have a weight of one of the parts, and check that each part has some."""
    found: dict[str, set[str]] = {part: set() for part in keep_in_float32}
    for operation in model.get_ordered_ops():
        weights = [value.get_node().get_friendly_name() for value in operation.input_values()]
        for part, operations in found.items():
            if any(f".{part}." in f".{weight}" for weight in weights):
                operations.add(operation.get_friendly_name())
    missing = [part for part, operations in found.items() if not operations]
    if missing:
        msg = (
            f"quantization: the exported graph has no weight of {', '.join(missing)}, which must stay in floating "
            "point: the exporter names weights in another way than this version of the package knows"
        )
        raise RuntimeError(msg)
    return set().union(*found.values())


def _other_operations(model: Any, precise: Collection[str]) -> Iterator[str]:
    """Name all operations but the matrix products and convolutions of the encoder and the decoder.

    Resizing and the anomaly map are exact interpolations. The first convolution, which is a transformer's embedding of
    patches, and elementwise operations are cheap, and OpenVINO 2026.4 fails on them.
    """
    encoding = False
    for operation in model.get_ordered_ops():
        kind, name = operation.get_type_name(), operation.get_friendly_name()
        has_constant = any(value.get_node().get_type_name() == "Constant" for value in operation.input_values())
        is_interpolation = has_constant and len(operation.get_output_partial_shape(0)) == 4
        # The smoothing of an anomaly map is a convolution to one channel.
        is_wide = kind == "Convolution" and operation.get_output_partial_shape(0)[1] != 1
        multiplies = (kind == "MatMul" and not is_interpolation) or is_wide
        if multiplies and encoding and name not in precise:
            continue
        # The encoder begins with a convolution.
        encoding = encoding or kind == "Convolution"
        if kind not in {"Constant", "Parameter", "Result"}:
            yield name


def _static_size(model: Any) -> tuple[int, int] | None:
    height, width = list(model.input(0).partial_shape)[2:]
    return (height.get_length(), width.get_length()) if height.is_static and width.is_static else None
