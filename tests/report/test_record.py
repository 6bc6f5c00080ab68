"""What is kept of a test: bounds, order, sums."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalib_decad.report.pictures import Picture
from anomalib_decad.report.record import Example, ProductRecord

THRESHOLD = 0.0
finite = st.floats(-100, 100, width=32)
predictions = st.lists(st.tuples(st.sampled_from(["normal", "defect", "unlabelled"]), finite), max_size=60)


def fill(rows, limit, threshold=THRESHOLD, first=0):
    record = ProductRecord(limit)
    for number, (kind, score) in enumerate(rows, first):
        flagged = None if threshold is None else score > threshold

        def make(number=number, kind=kind, score=score, flagged=flagged):
            return Example(f"{number}.png", kind, kind, flagged, score, Picture(1, 1, b""))

        record.add(kind, flagged, score, make)
    return record


@given(predictions, st.integers(1, 12))
def test_the_worst_come_first_and_nothing_worse_is_left_out(rows, limit):
    chosen = fill(rows, limit).chosen(limit)
    assert len(chosen) == min(limit, len(rows))
    wrong = [score for kind, score in rows if (kind == "normal") == (score > THRESHOLD) and kind != "unlabelled"]
    is_wrong = [example.is_wrong for example in chosen]
    assert is_wrong == sorted(is_wrong, reverse=True)
    assert sum(is_wrong) == min(len(wrong), limit)
    for kind, sign in (("normal", 1), ("defect", -1), ("unlabelled", 1)):
        shown = [sign * example.score for example in chosen if example.kind == kind]
        every = sorted((sign * score for name, score in rows if name == kind), reverse=True)
        # The most suspicious, or the most overlooked, of its kind.
        assert shown == every[: len(shown)]


@given(predictions, st.integers(1, 5))
def test_counts_and_scores_are_those_of_all_images(rows, limit):
    record = fill(rows, limit)
    assert record.num_images == len(rows)
    for kind in ("normal", "defect", "unlabelled"):
        scores = [score for name, score in rows if name == kind]
        assert record.counts[kind] == len(scores)
        assert record.counts[f"flagged {kind}"] == sum(score > THRESHOLD for score in scores)
    assert record.scores.counts[:2].sum() + record.unlabelled.counts[0].sum() == len(rows)


@given(predictions, predictions, st.integers(1, 6))
def test_two_processes_together_are_as_one(mine, theirs, limit):
    together = fill([*mine, *theirs], limit)
    record = fill(mine, limit)
    record.merge(pickle.loads(pickle.dumps(fill(theirs, limit, first=len(mine)))))
    assert record.counts == together.counts
    assert [e.score for e in record.chosen(limit)] == pytest.approx([e.score for e in together.chosen(limit)])


def test_an_image_that_two_processes_have_seen_is_shown_once():
    rows = [("normal", 0.1), ("defect", 0.2)]
    record = fill(rows, 5)
    record.merge(fill(rows, 5))
    assert len(record.chosen(10)) == 2


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_counted_and_not_shown(score):
    record = fill([("normal", score), ("normal", 0.5)], 5)
    assert record.counts["unscored"] == 1
    assert [example.score for example in record.chosen(5)] == [0.5]


def test_without_threshold_nothing_is_wrong():
    chosen = fill([("normal", 1.0), ("normal", 3.0), ("defect", 2.0), ("defect", -5.0)], 4, None).chosen(4)
    assert [example.score for example in chosen] == [3.0, -5.0, 1.0, 2.0]
    assert not any(example.is_wrong for example in chosen)
