"""Thresholds are what their policies say."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from anomalib_decad.metrics import ScoreHistogram
from anomalib_decad.thresholds import BestF1, FalseAlarmRate, FixedThreshold, ThresholdPolicy

floats = st.floats(-1e6, 1e6, width=32)


def histogram(scores, labels=None, max_bins=2**17):
    counts = ScoreHistogram(max_bins)
    scores = torch.as_tensor(scores, dtype=torch.float32)
    counts.update(scores, torch.zeros(len(scores)) if labels is None else torch.as_tensor(labels))
    return counts


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(floats, st.booleans()), min_size=2, max_size=60))
def test_no_other_threshold_has_a_larger_f1(pairs):
    scores = np.array([score for score, _ in pairs], np.float32)
    labels = np.array([label for _, label in pairs])
    threshold = BestF1().choose(histogram(scores, labels))
    if labels.all() or not labels.any():
        assert math.isnan(threshold)
        return
    found = f1_score(labels, scores > np.float32(threshold))
    assert found == pytest.approx(max(f1_score(labels, scores >= value) for value in np.unique(scores)))


@settings(max_examples=60, deadline=None)
@given(st.lists(floats, min_size=2, max_size=60, unique=True), st.data())
def test_no_score_is_the_threshold(scores, data):
    """Rounding, as in an export, would move an image to its other side."""
    scores = sorted(scores)
    count = data.draw(st.integers(1, len(scores) - 1))
    labels = [index >= count for index in range(len(scores))]
    threshold = BestF1().choose(histogram(scores, labels))
    if np.float32(scores[count]) > np.nextafter(np.float32(scores[count - 1]), np.float32(np.inf)):
        assert scores[count - 1] < threshold < scores[count]


@settings(max_examples=60, deadline=None)
@given(st.lists(floats, min_size=1, max_size=300), st.floats(0.001, 0.5))
def test_at_most_the_rate_of_normal_scores_is_above(scores, rate):
    policy, counts = FalseAlarmRate(rate), histogram(scores)
    threshold = np.float32(policy.choose(counts))
    above = (np.array(scores, np.float32) > threshold).sum()
    assert above <= rate * (len(scores) + 1)
    if policy.is_extrapolated(counts):
        assert above == 0
    else:
        # No looser than needed: one rank further down there would be too many.
        assert above + (np.array(scores, np.float32) == threshold).sum() + 1 > rate * (len(scores) + 1)


@pytest.mark.parametrize(("count", "rate"), [(20, 0.01), (200, 0.01), (2000, 0.01), (50, 0.1)])
def test_new_images_exceed_it_as_often_as_promised(count, rate):
    """Also where the rate is beyond the number of images, if the scores are normally distributed."""
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(300):
        scores = torch.randn(count, generator=generator)
        threshold = FalseAlarmRate(rate).choose(histogram(scores))
        rates.append(float(torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(-threshold))))
    assert np.mean(rates) == pytest.approx(rate, abs=max(0.005, 0.2 * rate))


def test_defects_do_not_move_it():
    normal, defects = torch.randn(500), 10 + torch.randn(500)
    alone = FalseAlarmRate(0.02).choose(histogram(normal))
    together = histogram(torch.cat([normal, defects]), torch.arange(1000) >= 500)
    assert FalseAlarmRate(0.02).choose(together) == alone
    assert BestF1().without_defects() == FalseAlarmRate(0.01)


def test_coarse_bins_never_let_more_through():
    scores = torch.rand(20_000)
    coarse = FalseAlarmRate(0.05).choose(histogram(scores, max_bins=64))
    assert (scores > coarse).float().mean() <= 0.05
    assert coarse < 1


@pytest.mark.parametrize("rate", [0, 1, -0.1, 2, math.nan])
def test_a_rate_is_a_share(rate):
    for policy in (BestF1, FalseAlarmRate):
        with pytest.raises(ValueError, match="must be in \\(0, 1\\)"):
            policy(rate)


def test_a_fixed_threshold_is_that():
    assert FixedThreshold(0.3).choose(histogram([1.0, 2.0])) == 0.3
    with pytest.raises(ValueError, match="must be finite"):
        FixedThreshold(math.nan)


@pytest.mark.parametrize("policy", [BestF1(0.2), FalseAlarmRate(0.3), FixedThreshold(1.5)])
def test_checkpoints_hold_plain_values(policy):
    config = policy.to_config()
    assert {type(value) for value in config.values()} <= {str, float}
    assert ThresholdPolicy.from_config(config) == policy
