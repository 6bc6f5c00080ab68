# SPDX-License-Identifier: Apache-2.0
"""Quantization of exported OpenVINO models to 8-bit integers by NNCF.

What anomalib does for ``INT8``, ``INT8_PTQ`` and ``INT8_ACQ``, but with the parts that need their precision left in
floating point, and calibrated on training images instead of test images. Which parts these are is declared by the
model, and each of them must be found in the graph.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import torch
from anomalib.data import AnomalibDataModule, ImageBatch, ImageItem
from anomalib.metrics import F1Score
from torchmetrics import Metric
from torchvision.transforms.v2.functional import InterpolationMode, resize

from anomalib_decad.ranges import check_range

__all__ = ["compress", "quantize", "quantize_with_accuracy_control"]

# NNCF's own default, beyond which statistics hardly change.
_CALIBRATION_IMAGES = 300


def compress(model: Any, float_parts: Sequence[str]) -> Any:
    """Store the weights of an exported model as 8-bit integers, but for those that need their precision.

    Args:
        model (openvino.Model): The exported model.
        float_parts (Sequence[str]): Names of the submodules whose weights stay as they are.

    Returns:
        openvino.Model: The compressed model, which computes in floating point.

    Raises:
        RuntimeError: If the graph has no weight of one of the parts.
    """
    import nncf

    precise = _operations_of(model, float_parts)
    with _quiet():
        return nncf.compress_weights(model, ignored_scope=nncf.IgnoredScope(names=sorted(precise), validate=False))


def quantize(model: Any, float_parts: Sequence[str], datamodule: AnomalibDataModule | None) -> Any:
    """Quantize encoder and decoder of an exported model.

    Args:
        model (openvino.Model): The exported model.
        float_parts (Sequence[str]): Names of the submodules that stay in floating point.
        datamodule (AnomalibDataModule | None): Its normal training images give the ranges of the activations.

    Returns:
        openvino.Model: The quantized model.

    Raises:
        ValueError: If there is no datamodule.
        RuntimeError: If the graph has no weight of one of the parts.
    """
    import nncf

    options = _options(model, float_parts)
    data = _set_up(datamodule)
    with _quiet():
        return nncf.quantize(model, _calibration(model, data), **options)


def quantize_with_accuracy_control(
    model: Any,
    float_parts: Sequence[str],
    datamodule: AnomalibDataModule | None,
    metric: Metric | None = None,
    max_drop: float = 0.01,
) -> Any:
    """Quantize encoder and decoder of an exported model, but for operations that would cost too much accuracy.

    Args:
        model (openvino.Model): The exported model.
        float_parts (Sequence[str]): Names of the submodules that stay in floating point.
        datamodule (AnomalibDataModule | None): Its normal training images give the ranges of the activations, its
            validation images the accuracy.
        metric (Metric | None): Accuracy; any of anomalib's metrics, higher is better.
            Defaults to ``None``: the F1 score of the predicted labels.
        max_drop (float): How much of the metric may be lost, in [0, 1].
            Defaults to ``0.01``.

    Returns:
        openvino.Model: The quantized model.

    Raises:
        ValueError: If there is no datamodule, or ``max_drop`` is out of its range.
        RuntimeError: If the graph has no weight of one of the parts.
    """
    import nncf

    check_range(0 <= max_drop <= 1, "max_drop", "between 0 and 1", max_drop)
    options = _options(model, float_parts)
    data = _set_up(datamodule)
    score = metric or F1Score(fields=["pred_label", "gt_label"])

    def accuracy(compiled: Callable[[Any], Any], indices: Iterable[int]) -> float:
        score.reset()
        for index in indices:  # read each time: all images together may not fit into memory
            score.update(_prediction(compiled, cast("ImageItem", data.val_data[index]), size))
        return float(score.compute())

    size = _static_size(model)
    # In a thread of its own: OpenVINO's CPU plugin replaces the stack for signal handlers of the thread that calls it,
    # and frees it. On the main thread the next process to end, such as a data loader's worker, would then end this one.
    with _quiet(), ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(
            nncf.quantize_with_accuracy_control,
            model,
            calibration_dataset=_calibration(model, data),
            validation_dataset=nncf.Dataset(list(range(len(data.val_data)))),
            validation_fn=accuracy,
            max_drop=max_drop,
            **options,
        ).result()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF from writing a line for each of the two thousand operations that are left alone."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _set_up(datamodule: AnomalibDataModule | None) -> AnomalibDataModule:
    if datamodule is None:
        msg = "quantization to 8 bits needs images: give a datamodule (--data)"
        raise ValueError(msg)
    datamodule.setup("fit")
    return datamodule


def _calibration(model: Any, datamodule: AnomalibDataModule) -> Any:
    import nncf

    images = datamodule.train_data
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:_CALIBRATION_IMAGES]
    size = _static_size(model)
    return nncf.Dataset(order.tolist(), lambda index: _input(cast("torch.Tensor", images[index].image), size))


def _options(model: Any, float_parts: Sequence[str]) -> dict[str, Any]:
    import nncf

    precise = _operations_of(model, float_parts)
    names = sorted({*precise, *_other_operations(model, precise)})
    return {
        "model_type": nncf.ModelType.TRANSFORMER,
        "subset_size": _CALIBRATION_IMAGES,
        "ignored_scope": nncf.IgnoredScope(names=names, validate=False),
    }


def _operations_of(model: Any, float_parts: Sequence[str]) -> set[str]:
    """Name the operations that have a weight of one of the parts, and check that each part has some."""
    found: dict[str, set[str]] = {part: set() for part in float_parts}
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
        constants = [value.get_node() for value in operation.input_values() if _is_constant(value.get_node())]
        is_interpolation = bool(constants) and len(operation.get_output_partial_shape(0)) == 4
        multiplies = (kind == "MatMul" and not is_interpolation) or (kind == "Convolution" and not _is_blur(operation))
        if multiplies and encoding and name not in precise:
            continue
        # The encoder begins with a convolution.
        encoding = encoding or kind == "Convolution"
        if kind not in {"Constant", "Parameter", "Result"}:
            yield name


def _is_blur(operation: Any) -> bool:
    """Tell the smoothing of an anomaly map, of one channel, from a network's convolutions."""
    channels = operation.get_output_partial_shape(0)[1]
    return channels.is_static and channels.get_length() == 1


def _is_constant(node: Any) -> bool:
    return node.get_type_name() == "Constant"


def _static_size(model: Any) -> tuple[int, int] | None:
    height, width = list(model.input(0).partial_shape)[2:]
    return (height.get_length(), width.get_length()) if height.is_static and width.is_static else None


def _input(image: torch.Tensor, size: tuple[int, int] | None) -> Any:
    """Make an array of shape (1, 3, H, W) from an image of shape (3, H, W)."""
    if size is not None and tuple(image.shape[-2:]) != size:
        image = resize(image, list(size), antialias=True)
    return image[None].numpy()


def _prediction(compiled: Callable[[Any], Any], item: ImageItem, size: tuple[int, int] | None) -> ImageBatch:
    image = cast("torch.Tensor", item.image)
    outputs = compiled(_input(image, size))
    maps = torch.from_numpy(outputs["anomaly_map"])
    mask = item.gt_mask
    if mask is not None:
        mask = resize(mask[None].float(), list(maps.shape[-2:]), InterpolationMode.NEAREST).bool()
    return ImageBatch(
        image=image[None],
        gt_label=torch.as_tensor(item.gt_label).reshape(1),
        gt_mask=mask,
        anomaly_map=maps.flatten(0, -3),
        pred_score=torch.from_numpy(outputs["pred_score"]).reshape(1),
        pred_label=torch.from_numpy(outputs["pred_label"]).reshape(1),
        pred_mask=torch.from_numpy(outputs["pred_mask"]).flatten(0, -3),
    )
