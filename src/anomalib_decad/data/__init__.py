# SPDX-License-Identifier: Apache-2.0
"""Many categories in one datamodule."""

from anomalib_decad.data.category_batch import CategoryBatch, CategoryItem
from anomalib_decad.data.category_dataset import CategoryDataset
from anomalib_decad.data.multi_category import MultiCategory
from anomalib_decad.data.prediction_root import PredictionRoot
from anomalib_decad.data.reading import find_unreadable
from anomalib_decad.data.visualizer import CategoryVisualizer

__all__ = [
    "CategoryBatch",
    "CategoryDataset",
    "CategoryItem",
    "CategoryVisualizer",
    "MultiCategory",
    "PredictionRoot",
    "find_unreadable",
]
