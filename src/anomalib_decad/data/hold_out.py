# SPDX-License-Identifier: Apache-2.0
"""Training images that take the place of missing validation images."""

from anomalib.data import AnomalibDataset

__all__ = ["hold_out"]

#: Every how many training images one is held out, and how many at least and at most. Of fewer than four times the
#: least, it is a quarter.
_EVERY, _LEAST, _MOST = 10, 6, 64


def hold_out(datasets: dict[str, AnomalibDataset]) -> int:
    """Take validation images from a category's training images, if it has none.

    Thresholds of a category are found by its validation images. Where it has neither these nor test images, as at the
    start of a new product, normal images that the training has not seen show how high normal scores are.

    Args:
        datasets (dict[str, AnomalibDataset]): The category's datasets by subset, which change: ``train`` and ``val``.

    Returns:
        int: How many images were taken; 0 if there are validation images, or a single training image.
    """
    train = datasets["train"]
    if len(datasets.get("val", ())) or len(train) < 2:
        return 0
    count = min(max(len(train) // _EVERY, min(_LEAST, len(train) // 4), 1), _MOST)
    chosen = [number * len(train) // count for number in range(count)]
    kept = [index for index in range(len(train)) if index not in set(chosen)]
    datasets["train"], datasets["val"] = train.subsample(kept), train.subsample(chosen)
    return count
