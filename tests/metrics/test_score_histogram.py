import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_decad.metrics import ScoreHistogram

FLOATS = st.floats(-1e6, 1e6, width=32)


def reference(scores, labels):
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return roc_auc_score(labels, scores), average_precision_score(labels, scores), f1.max()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(FLOATS, st.booleans()), min_size=2, max_size=60).filter(lambda r: len({b for _, b in r}) == 2)
)
def test_few_scores_are_exact(rows):
    scores = torch.tensor([score for score, _ in rows], dtype=torch.float32)
    labels = torch.tensor([label for _, label in rows])
    histogram = ScoreHistogram()
    half = len(rows) // 2
    histogram.update(scores[:half], labels[:half])
    histogram.update(scores[half:], labels[half:])
    metrics = histogram.metrics()
    expected = reference(scores.numpy(), labels.numpy())
    assert (metrics["AUROC"], metrics["AP"], metrics["F1Max"]) == pytest.approx(expected, abs=1e-9)


TRANSFORMS = {
    "normal": lambda z: z,
    "bunched": lambda z: 0.5 + 1e-5 * z,
    "heavy-tailed": lambda z: np.exp(6 * z),
    "tiny": lambda z: 1e-30 * np.exp(z),
    "negative": lambda z: -np.exp(-z),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_many_scores_are_close_in_bounded_memory(name):
    rng = np.random.default_rng(0)
    labels = rng.random(1_000_000) < 0.05
    scores = TRANSFORMS[name](rng.normal(size=len(labels)) + 1.5 * labels).astype(np.float32)
    histogram = ScoreHistogram(max_bins=2**14)
    for part in np.array_split(np.arange(len(scores)), 7):
        histogram.update(torch.from_numpy(scores[part]), torch.from_numpy(labels[part]))
    assert len(histogram.codes) <= 2**14
    assert histogram.shift > 0 or name == "bunched"
    metrics = histogram.metrics()
    errors = [
        metrics[key] - value for key, value in zip(("AUROC", "AP", "F1Max"), reference(scores, labels), strict=True)
    ]
    assert np.abs(errors).max() <= 1e-3


def test_order_and_merging_do_not_matter():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(np.exp(rng.normal(size=20_000)).astype(np.float32))
    labels = torch.from_numpy(rng.random(20_000) < 0.2)
    whole, first, second = (ScoreHistogram(max_bins=500) for _ in range(3))
    whole.update(scores, labels)
    first.update(scores[:300], labels[:300])
    second.update(scores[300:], labels[300:])
    first.merge(second)
    assert first.shift == whole.shift > 0
    np.testing.assert_array_equal(first.codes, whole.codes)
    np.testing.assert_array_equal(first.counts, whole.counts)


@given(st.lists(FLOATS, min_size=2, max_size=50, unique=True))
def test_the_smallest_score_is_rounded_down(values):
    histogram = ScoreHistogram(max_bins=4)
    histogram.update(torch.tensor(values, dtype=torch.float32), torch.zeros(len(values)))
    assert histogram.smallest() <= np.float32(min(values))


def test_best_threshold_separates():
    histogram = ScoreHistogram()
    histogram.update(torch.tensor([-2.0, -1.0, 3.0, 4.0]), torch.tensor([False, False, True, True]))
    assert histogram.best_f1() == (1.0, 3.0)


def test_one_class_has_no_metrics():
    histogram = ScoreHistogram()
    histogram.update(torch.rand(5), torch.zeros(5))
    assert all(np.isnan(value) for value in histogram.metrics().values())


def test_scores_must_be_finite():
    with pytest.raises(ValueError, match="finite"):
        ScoreHistogram().update(torch.tensor([1.0, float("nan")]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="max_bins"):
        ScoreHistogram(max_bins=1)
