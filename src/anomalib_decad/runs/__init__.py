# SPDX-License-Identifier: Apache-2.0
"""How a run ends, what it leaves behind, and where."""

from anomalib_decad.runs.final_validation import FinalValidation

__all__ = ["FinalValidation"]
