"""The threshold in bounded memory equals scikit-learn's."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from anomalib_decad.metrics import BoundedPostProcessor, HistogramF1Threshold
from anomalib_decad.metrics.threshold import _HistogramF1Threshold


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=2, max_size=60))
def test_no_other_threshold_has_a_larger_f1(pairs):
    scores = torch.tensor([score / 7 for score, _ in pairs])
    labels = torch.tensor([label for _, label in pairs])
    if labels.all() or not labels.any():
        return
    metric = _HistogramF1Threshold()
    for part in torch.arange(len(scores)).chunk(3):
        metric.update(scores[part], labels[part])
    threshold = metric.compute().item()
    found = f1_score(labels, scores >= threshold)
    best = max(f1_score(labels, scores >= value) for value in scores.unique())
    assert found == pytest.approx(best)


@pytest.mark.parametrize(("label", "expected", "word"), [(False, 3.0, "no anomaly"), (True, 1.0, "nothing normal")])
def test_one_kind_of_image_is_said(label, expected, word, caplog):
    metric = _HistogramF1Threshold()
    metric.update(torch.tensor([1.0, 3.0, 2.0]), torch.full((3,), label))
    with caplog.at_level(logging.WARNING):
        assert metric.compute().item() == pytest.approx(expected)
    assert word in caplog.text


def test_reset_forgets():
    metric = _HistogramF1Threshold()
    metric.update(torch.tensor([1.0, 100.0]), torch.tensor([False, True]))
    metric.reset()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([False, True]))
    assert 1.0 < metric.compute().item() <= 2.0


def test_anomalibs_post_processor_has_them():
    post_processor = BoundedPostProcessor()
    metrics = [post_processor._image_threshold_metric, post_processor._pixel_threshold_metric]
    assert all(isinstance(metric, HistogramF1Threshold) for metric in metrics)
    assert np.isnan(post_processor.image_threshold.item())
