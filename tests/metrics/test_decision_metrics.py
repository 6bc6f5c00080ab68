"""Metrics of decisions equal scikit-learn's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score

from anomalib_decad.metrics import DecisionMetrics

image = st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.lists(image, min_size=1, max_size=40), st.integers(1, 5))
def test_labels_are_measured_as_by_scikit_learn(images, parts):
    metrics = DecisionMetrics()
    for start in range(parts):
        if chosen := images[start::parts]:
            categories, predicted, truth = zip(*chosen, strict=True)
            metrics.update(categories, torch.tensor(predicted), torch.tensor(truth))
    table = metrics.compute()
    names = sorted({name for name, *_ in images})
    assert list(table) == [*names, "mean"]
    for name in names:
        predicted, truth = zip(*(row[1:] for row in images if row[0] == name), strict=True)
        row = table[name]
        if any(truth):
            assert row["label_F1"] == pytest.approx(f1_score(truth, predicted, zero_division=0))
            assert row["label_recall"] == pytest.approx(recall_score(truth, predicted, zero_division=0))
        else:
            assert math.isnan(row["label_F1"])
        if any(predicted):
            assert row["label_precision"] == pytest.approx(precision_score(truth, predicted))
        normal = [p for p, t in zip(predicted, truth, strict=True) if not t]
        expected = sum(normal) / len(normal) if normal else math.nan
        assert row["false_alarm_rate"] == pytest.approx(expected, nan_ok=True)
        assert math.isnan(row["mask_F1"])


def test_masks_are_measured_over_all_pixels_of_a_category():
    predicted, truth = torch.rand(2, 6, 1, 5, 7) > 0.5
    metrics = DecisionMetrics()
    metrics.update(["a"] * 4 + ["b"] * 2, predicted.flatten(1).any(1), truth.flatten(1).any(1), predicted, truth)
    for name, rows in (("a", slice(4)), ("b", slice(4, 6))):
        expected = f1_score(truth[rows].flatten(), predicted[rows].flatten())
        assert metrics.compute()[name]["mask_F1"] == pytest.approx(expected)


def test_without_decisions_there_is_nothing():
    assert DecisionMetrics().compute() == {}
