"""What the benchmark of thresholds measures."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

import decisions


@st.composite
def scored(draw):
    """Scores and labels of two categories, each with normal and anomalous images, and held out normal ones."""
    names, scores, labels, held_out = [], [], [], {}
    value = st.integers(1, 1000).map(lambda number: number / 100)
    for name in ("bolts", "cloth"):
        for label in (False, True):
            found = draw(st.lists(value, min_size=2, max_size=12))
            names += [name] * len(found)
            scores += found
            labels += [label] * len(found)
        held_out[name] = np.array(draw(st.lists(value, min_size=1, max_size=30)), np.float32)
    return names, np.array(scores, np.float32), np.array(labels), held_out


@settings(deadline=None)
@given(scored())
def test_no_threshold_is_better_than_the_best_and_ones_own_is_the_best(data):
    names, scores, labels, held_out = data
    table = decisions.decide(names, scores, labels, held_out)
    assert set(table) == {"bolts", "cloth", "mean"}
    for category in ("bolts", "cloth"):
        row = table[category]
        assert all(0 <= value <= 1 for value in row.values())
        assert row["joint"] <= row["best"]
        assert row["own"] == row["best"]
        rows = np.array(names) == category
        # A threshold below all says that all have a defect.
        assert row["best"] >= round(f1_score(labels[rows], np.ones(rows.sum())), 4)
    for name, value in table["mean"].items():
        assert value == pytest.approx(np.mean([table["bolts"][name], table["cloth"][name]]), abs=2e-4)
