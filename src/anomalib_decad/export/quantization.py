# SPDX-License-Identifier: Apache-2.0
"""Quantization of exported OpenVINO models to 8-bit integers by NNCF.

What anomalib does for ``INT8``, ``INT8_PTQ`` and ``INT8_ACQ``, but with the parts that the model declares left in
floating point, and calibrated on training images instead of test images.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import torch
from anomalib.data import AnomalibDataModule, ImageBatch, ImageItem
from anomalib.deploy import CompressionType
from anomalib.metrics import F1Score
from torchmetrics import Metric
from torchvision.transforms.v2.functional import InterpolationMode, resize

__all__ = ["quantize", "quiet"]

# NNCF's own default, beyond which statistics hardly change.
_CALIBRATION_IMAGES = 300


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keep loggers from writing anything but errors, until the context ends."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def quantize(
    model: Any,
    kind: CompressionType,
    keep_in_float32: Sequence[str],
    datamodule: AnomalibDataModule | None = None,
    metric: Metric | None = None,
    max_drop: float = 0.01,
) -> Any:
    """Quantize an exported model: its weights (INT8), or also what encoder and decoder compute with them.

    Args:
        model (openvino.Model): The exported model.
        kind (CompressionType): ``INT8``, ``INT8_PTQ`` or ``INT8_ACQ``.
        keep_in_float32 (Sequence[str]): Names of the submodules that stay in floating point.
        datamodule (AnomalibDataModule | None): For all but INT8: its training images give the ranges of the
            activations, its validation images the accuracy.
        metric (Metric | None): Accuracy of INT8_ACQ; any of anomalib's metrics, higher is better.
            Defaults to ``None``: the F1 score of the predicted labels.
        max_drop (float): How much of the metric INT8_ACQ may lose, in [0, 1].
            Defaults to ``0.01``.

    Returns:
        openvino.Model: The quantized model.

    Raises:
        RuntimeError: If the graph has no weight of one of the parts.
    """
    import nncf

    precise = _operations_of(model, keep_in_float32)
    # In a thread of its own: OpenVINO's CPU plugin replaces the stack for signal handlers of the thread that calls it,
    # and frees it. On the main thread the next process to end, such as a data loader's worker, would then end this one.
    with quiet("nncf"), ThreadPoolExecutor(max_workers=1) as executor:
        if kind == CompressionType.INT8:
            scope = nncf.IgnoredScope(names=sorted(precise), validate=False)
            return nncf.compress_weights(model, ignored_scope=scope)
        data = cast("AnomalibDataModule", datamodule)
        data.setup("fit")
        size, images = _static_size(model), data.train_data
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:_CALIBRATION_IMAGES]
        names = sorted({*precise, *_other_operations(model, precise)})
        options = {
            "calibration_dataset": nncf.Dataset(
                order.tolist(), lambda index: _input(cast("ImageItem", images[index]), size)
            ),
            "model_type": nncf.ModelType.TRANSFORMER,
            "subset_size": _CALIBRATION_IMAGES,
            "ignored_scope": nncf.IgnoredScope(names=names, validate=False),
        }
        if kind == CompressionType.INT8_PTQ:
            return nncf.quantize(model, **options)
        score = metric or F1Score(fields=["pred_label", "gt_label"])

        def accuracy(compiled: Callable[[Any], Any], indices: Iterable[int]) -> float:
            score.reset()
            for index in indices:  # read each time: all images together may not fit into memory
                score.update(_prediction(compiled, cast("ImageItem", data.val_data[index]), size))
            return float(score.compute())

        options |= {"validation_fn": accuracy, "max_drop": max_drop}
        validation = nncf.Dataset(list(range(len(data.val_data))))
        call = nncf.quantize_with_accuracy_control
        return executor.submit(call, model, validation_dataset=validation, **options).result()


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


def _input(item: ImageItem, size: tuple[int, int] | None) -> Any:
    """Make an array of shape (1, 3, H, W) from an image of shape (3, H, W)."""
    image = cast("torch.Tensor", item.image)
    return (resize(image, list(size), antialias=True) if size else image)[None].numpy()


def _prediction(compiled: Callable[[Any], Any], item: ImageItem, size: tuple[int, int] | None) -> ImageBatch:
    outputs = compiled(_input(item, size))
    maps = torch.from_numpy(outputs["anomaly_map"])
    mask = item.gt_mask
    if mask is not None:
        mask = resize(mask[None].float(), list(maps.shape[-2:]), InterpolationMode.NEAREST).bool()
    return ImageBatch(
        image=cast("torch.Tensor", item.image)[None],
        gt_label=torch.as_tensor(item.gt_label).reshape(1),
        gt_mask=mask,
        anomaly_map=maps.flatten(0, -3),
        pred_score=torch.from_numpy(outputs["pred_score"]).reshape(1),
        pred_label=torch.from_numpy(outputs["pred_label"]).reshape(1),
        pred_mask=torch.from_numpy(outputs["pred_mask"]).flatten(0, -3),
    )
