# SPDX-License-Identifier: Apache-2.0
"""From a trained model to torch, ONNX, OpenVINO and 8-bit integers."""

from anomalib_decad.export.mixin import ParityExportMixin
from anomalib_decad.export.pre_processor import MatrixResize, for_export

__all__ = ["MatrixResize", "ParityExportMixin", "for_export"]
