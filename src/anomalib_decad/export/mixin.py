# SPDX-License-Identifier: Apache-2.0
"""Exports that predict what the checkpoint predicts."""

import copy
import json
import logging
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
from typing_extensions import Self

from anomalib_decad.compat import shallow_copy
from anomalib_decad.export.pre_processor import for_export
from anomalib_decad.export.quantization import quantize
from anomalib_decad.files import write_text_atomically
from anomalib_decad.thresholds import CategoryPostProcessor, exported_thresholds

__all__ = ["ParityExportMixin"]

logger = logging.getLogger(__name__)

_OPSET = 18  # the lowest ONNX operator set that torch writes without a conversion
_ONNX_LIMIT = 2**31  # bytes that one ONNX file can hold; weights beyond it go to a second file

# anomalib finds its models as the direct subclasses of AnomalibModule: this must not be one.
if TYPE_CHECKING:
    _Base = AnomalibModule
else:
    _Base = object


class ParityExportMixin(_Base):
    """anomalib's exports, with the same predictions as the checkpoint's.

    ``AnomalibModule`` comes after it in the order of bases. The class has a torch module ``model`` with a method
    ``fused(image_size)``, which copies it for inference, and an attribute ``keep_in_float32``, the names of the parts
    that quantization leaves in floating point.
    """

    model: Any

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export to PyTorch: arguments and result are those of ``AnomalibModule.to_torch``."""
        export = super(ParityExportMixin, self._for_export(native=True)).to_torch
        return self._add_thresholds(export(export_root, model_file_name))

    def to_onnx(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX, also on the way to OpenVINO.

        Pre- and post-processing are in the graph, the batch size is free, and images are of any size, which the graph
        resizes, unless ``input_size`` is given. It is one file, unless the weights are too large for one. Arguments and
        result are those of ``AnomalibModule.to_onnx``.

        Raises:
            ValueError: If the model does not resize its input and no fitting ``input_size`` is given.
        """
        if self.input_size is None and input_size is None:
            msg = "the pre_processor does not resize to one size: give that of the images (--input_size)"
            raise ValueError(msg)
        module = self._for_export(input_size)
        size = sum(value.nbytes for value in module.state_dict().values() if hasattr(value, "nbytes"))
        options = {"opset_version": _OPSET, "external_data": size >= _ONNX_LIMIT, **kwargs}
        export = super(ParityExportMixin, module).to_onnx
        with _quiet("onnx_ir", "onnxscript"):
            return self._add_thresholds(export(export_root, model_file_name, input_size, **options))

    def to_openvino(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to OpenVINO: arguments and result are those of ``AnomalibModule.to_openvino``.

        ``compression_type`` is ``"fp16"`` or ``"int8"`` for smaller files, or ``"int8_ptq"`` for speed, for which the
        datamodule's training images give the ranges of the activations.

        Raises:
            ValueError: If ``compression_type`` is another, or needs a datamodule and there is none.
        """
        compression = None if compression_type is None else CompressionType(compression_type)
        # Before the half minute that the graph takes.
        if compression == CompressionType.INT8_ACQ:
            msg = "int8_acq is not offered: int8_ptq keeps what needs its precision in floating point"
            raise ValueError(msg)
        if compression == CompressionType.INT8_PTQ and datamodule is None:
            msg = "int8_ptq needs images to calibrate with: give the data of the training (--data ...)"
            raise ValueError(msg)
        path = super().to_openvino(export_root, model_file_name, input_size, compression, datamodule, **kwargs)
        return self._add_thresholds(path)

    def _compress_ov_model(  # type: ignore[override]
        self, model: Any, compression_type: CompressionType, datamodule: AnomalibDataModule | None, *args: Any
    ) -> Any:
        """Quantize all but the parts that need their precision, where anomalib quantizes everything."""
        del args
        return quantize(model, compression_type, self.model.keep_in_float32, datamodule)

    def _add_thresholds(self, path: Path) -> Path:
        """Write the thresholds beside an export: a change of them needs no new one."""
        if isinstance(self.post_processor, CategoryPostProcessor):
            content = json.dumps(exported_thresholds(self.post_processor), indent=2)
            write_text_atomically(path.with_name(f"{path.stem}.thresholds.json"), content + "\n")
        return path

    def _for_export(self, input_size: tuple[int, int] | None = None, native: bool = False) -> Self:
        """Copy the module without what only training needs, specialized for its image size."""
        if isinstance(self.post_processor, CategoryPostProcessor):
            # It knows the product that the export is for.
            self.post_processor.limits(self.post_processor.category)
        module = shallow_copy(self)
        module.trainer = None
        module.model = self.model.fused(self.input_size or input_size)
        for name, value in [*vars(module).items(), *module.named_children()]:
            if isinstance(value, Callback):
                copied = copy.copy(value)
                for method in ("log", "log_dict"):  # the trainer's, bound to the model, and pickled with it
                    vars(copied).pop(method, None)
                setattr(module, name, copied)
        if isinstance(module.pre_processor, PreProcessor):
            module.pre_processor = for_export(module.pre_processor, native)
        post = module.post_processor
        ranges = "image_min", "image_max", "pixel_min", "pixel_max"
        is_new = post is not None and all(bool(getattr(post, name).isnan()) for name in ranges)
        if isinstance(post, PostProcessor) and post.enable_normalization and is_new:
            # It leaves scores as they are then. But OpenVINO 2026.4 fails to simplify a graph with NaNs in it.
            post.enable_normalization = False
            logger.warning(
                "The model was never validated, so it has neither thresholds nor the range of its scores: the export "
                "gives scores and maps as they are, and its labels and masks mean nothing. Export a checkpoint that "
                "was saved after a validation (--trainer.val_check_interval says when these are)."
            )
        return module


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Have loggers write errors alone (docs/upstream.md, "An export writes hundreds of lines")."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
