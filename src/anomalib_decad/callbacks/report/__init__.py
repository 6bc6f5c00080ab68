# SPDX-License-Identifier: Apache-2.0
"""A page that shows what a test has found, for every anomalib model."""

from anomalib_decad.callbacks.report.callback import Report

__all__ = ["Report"]
