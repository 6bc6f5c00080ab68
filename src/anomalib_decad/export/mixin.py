# SPDX-License-Identifier: Apache-2.0
"""Exports that predict what the checkpoint predicts."""

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from torchmetrics import Metric
from typing_extensions import Self

from anomalib_decad.compat import shallow_copy
from anomalib_decad.decisions import CategoryPostProcessor, exported_thresholds
from anomalib_decad.export.post_processor import without_unknown_range
from anomalib_decad.export.pre_processor import for_export
from anomalib_decad.export.quantization import compress, quantize, quantize_with_accuracy_control
from anomalib_decad.metrics import lacks_threshold
from anomalib_decad.ranges import check_range
from anomalib_decad.whole_files import write_text

__all__ = ["ParityExportMixin"]

#: The lowest ONNX operator set that torch writes without a conversion.
_OPSET = 18

#: What one ONNX file can hold, in bytes; weights beyond it go to a second file.
_ONNX_LIMIT = 2**31

_INTEGERS = {CompressionType.INT8, CompressionType.INT8_PTQ, CompressionType.INT8_ACQ}

# anomalib finds its models as the direct subclasses of AnomalibModule: this must not be one.
if TYPE_CHECKING:
    _Base = AnomalibModule
else:
    _Base = object


class ParityExportMixin(_Base):
    """anomalib's exports, with the same predictions as the checkpoint's.

    ``AnomalibModule`` comes behind it in the order of bases. The class has a torch module ``model`` with a method
    ``fused(image_size)``, which copies it for inference, and an attribute ``float_parts``, the names of the parts that
    quantization leaves in floating point.

    A file appears when it is complete: an export that is cut short leaves what was there before.
    """

    model: Any

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export to PyTorch.

        Args:
            export_root (Path | str): Folder to export to.
            model_file_name (str): Name of the file, without its ending.
                Defaults to ``"model"``.

        Returns:
            Path: The .pt file.
        """
        with _staging(export_root) as folder:
            path = super(ParityExportMixin, self._for_export(native=True)).to_torch(folder, model_file_name)
            self._write_thresholds(path)
        return Path(export_root) / path.relative_to(folder)

    def to_onnx(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX, also on the way to OpenVINO.

        Pre- and post-processing are in the graph, the batch size is free. It is one file, unless the weights are too
        large for one.

        Args:
            export_root (Path | str): Folder to export to.
            model_file_name (str): Name of the file, without its ending.
                Defaults to ``"model"``.
            input_size (tuple[int, int] | None): Height and width of the input images.
                Defaults to ``None``: images of any size, which the graph resizes.
            **kwargs (Any): Arguments of ``AnomalibModule.to_onnx``, and from there of ``torch.onnx.export``.

        Returns:
            Path: The ONNX file.

        Raises:
            ValueError: If the model does not resize its input and no fitting ``input_size`` is given.
        """
        if self.input_size is None and input_size is None:
            msg = "the pre_processor does not resize to one size: give that of the images (--input_size)"
            raise ValueError(msg)
        kwargs.setdefault("opset_version", _OPSET)
        module = self._for_export(input_size)
        size = sum(value.nbytes for value in module.state_dict().values() if hasattr(value, "nbytes"))
        kwargs.setdefault("external_data", size >= _ONNX_LIMIT)
        with _staging(export_root) as folder:
            path = super(ParityExportMixin, module).to_onnx(folder, model_file_name, input_size, **kwargs)
            self._write_thresholds(path)
        return Path(export_root) / path.relative_to(folder)

    def to_openvino(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | str | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: Any = None,
        max_drop: float = 0.01,
        **kwargs: Any,
    ) -> Path:
        """Export to OpenVINO.

        Args:
            export_root (Path | str): Folder to export to.
            model_file_name (str): Name of the files, without their endings.
                Defaults to ``"model"``.
            input_size (tuple[int, int] | None): Height and width of the input images.
                Defaults to ``None``: images of any size, which the graph resizes.
            compression_type (CompressionType | str | None): ``"FP16"`` or ``"INT8"`` for smaller files, ``"INT8_PTQ"``
                or ``"INT8_ACQ"`` (with accuracy control) for speed.
                Defaults to ``None``: none.
            datamodule (AnomalibDataModule | None): Images for ``"INT8_PTQ"`` and ``"INT8_ACQ"``: training images for
                the ranges of the activations, validation images for the accuracy control.
            metric (Metric | None): Accuracy that ``"INT8_ACQ"`` controls; any of anomalib's metrics, higher is better.
                Defaults to ``None``: the F1 score of the predicted labels.
            task (Any): Unused, as in anomalib.
            max_drop (float): How much of the metric ``"INT8_ACQ"`` may lose, in [0, 1].
                Defaults to ``0.01``.
            **kwargs (Any): ``ov_kwargs`` and ``onnx_kwargs`` of ``AnomalibModule.to_openvino``.

        Returns:
            Path: The .xml file, beside which the .bin file is.

        Raises:
            ValueError: If ``compression_type`` is unknown, or needs a datamodule and there is none, or needs labels and
                the model has no thresholds because it was never validated.
        """
        del task
        compression = CompressionType(compression_type.lower()) if isinstance(compression_type, str) else None
        if compression in {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ} and datamodule is None:
            # Before the half minute that the graph takes.
            msg = f"{compression.value} needs images to calibrate with: give the data of the training (--data ...)"
            raise ValueError(msg)
        if compression == CompressionType.INT8_ACQ and metric is None and lacks_threshold(self.post_processor):
            msg = (
                "INT8_ACQ controls the accuracy of labels, but the model was never validated and has no thresholds: "
                "export a checkpoint that was saved after a validation, or use INT8_PTQ"
            )
            raise ValueError(msg)
        plain = None if compression in _INTEGERS else compression
        with _staging(export_root) as folder:
            path = super().to_openvino(folder, model_file_name, input_size, plain, **kwargs)
            if compression in _INTEGERS:
                self._to_integers(path, compression, datamodule, metric, max_drop)
            self._write_thresholds(path)
        return Path(export_root) / path.relative_to(folder)

    def _to_integers(
        self,
        path: Path,
        compression: CompressionType,
        datamodule: AnomalibDataModule | None,
        metric: Metric | None,
        max_drop: float,
    ) -> None:
        """Replace an exported OpenVINO model by one of 8-bit integers."""
        import openvino

        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": False})  # the file is replaced
        model = core.read_model(path)
        float_parts = self.model.float_parts
        if compression == CompressionType.INT8:
            model = compress(model, float_parts)
        elif compression == CompressionType.INT8_PTQ:
            model = quantize(model, float_parts, datamodule)
        else:
            model = quantize_with_accuracy_control(model, float_parts, datamodule, metric, max_drop)
        openvino.save_model(model, path, compress_to_fp16=False)

    def _write_thresholds(self, path: Path) -> None:
        """Write the thresholds of an exported file beside it, where a change of them needs no new export."""
        if isinstance(self.post_processor, CategoryPostProcessor):
            content = json.dumps(exported_thresholds(self.post_processor), indent=2)
            write_text(path.with_name(f"{path.stem}.thresholds.json"), content + "\n")

    def _for_export(self, input_size: tuple[int, int] | None = None, native: bool = False) -> Self:
        """Copy the module without what only training needs, specialized for its image size.

        Raises:
            ValueError: If the size is not positive, or the export is to be for a product that the model does not know.
        """
        if input_size is not None:
            range_ = "two positive numbers, height and width"
            check_range(min(input_size) > 0, "input_size", range_, list(input_size))
        if isinstance(self.post_processor, CategoryPostProcessor):
            # It knows the product that the export is for.
            self.post_processor.limits(self.post_processor.category)
        module = shallow_copy(self)
        module.trainer = None
        module.model = self.model.fused(self.input_size or input_size)
        for name, value in [*vars(module).items(), *module.named_children()]:
            if isinstance(value, Callback):
                setattr(module, name, _detached(value))
        if isinstance(module.pre_processor, PreProcessor):
            module.pre_processor = for_export(module.pre_processor, native)
        if isinstance(module.post_processor, PostProcessor):
            module.post_processor = without_unknown_range(module.post_processor)
        return module


@contextmanager
def _staging(export_root: Path | str) -> Iterator[Path]:
    """Give a folder whose files move to ``export_root`` when all of them have been written."""
    root = Path(export_root)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"the export cannot be written to {root} ({error.strerror or error}): give another folder (--export_root)"
        raise type(error)(error.errno, msg) from error
    with tempfile.TemporaryDirectory(prefix=".export-", dir=root) as name:
        folder = Path(name)
        yield folder
        for path in sorted(folder.rglob("*")):
            target = root / path.relative_to(folder)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                path.replace(target)


def _detached(callback: Callback) -> Callback:
    """Copy a callback without the methods that a trainer gave it: they are bound to the model, and pickled with it."""
    copied = copy.copy(callback)
    for name in ("log", "log_dict"):
        vars(copied).pop(name, None)
    return copied
