# SPDX-License-Identifier: Apache-2.0
"""How a run ends, what it leaves behind, and where."""

from anomalib_decad.runs.checkpoint_io import reading
from anomalib_decad.runs.data_order import DataOrder
from anomalib_decad.runs.final_validation import FinalValidation
from anomalib_decad.runs.folder import RunFolder
from anomalib_decad.runs.given_rates import GivenRates
from anomalib_decad.runs.last_state import LastState
from anomalib_decad.runs.map_writer import MapWriter
from anomalib_decad.runs.prediction import PredictionSummary
from anomalib_decad.runs.prediction_table import PredictionTable

__all__ = [
    "DataOrder",
    "FinalValidation",
    "GivenRates",
    "LastState",
    "MapWriter",
    "PredictionSummary",
    "PredictionTable",
    "RunFolder",
    "reading",
]
