# SPDX-License-Identifier: Apache-2.0
"""Many categories in one datamodule."""

from anomalib_decad.data.dataset import CategoryBatch, CategoryDataset, CategoryItem
from anomalib_decad.data.multi_category import MultiCategory
from anomalib_decad.data.prediction_folder import PredictionFolder
from anomalib_decad.data.reading import image_size, read_image
from anomalib_decad.data.visualizer import CategoryVisualizer, place_of

__all__ = [
    "CategoryBatch",
    "CategoryDataset",
    "CategoryItem",
    "CategoryVisualizer",
    "MultiCategory",
    "PredictionFolder",
    "image_size",
    "place_of",
    "read_image",
]
