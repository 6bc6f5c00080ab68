"""What is kept of a test: bounds, order, sums."""

import pickle

from hypothesis import given
from hypothesis import strategies as st

from anomalib_decad.callbacks.report.record import KINDS, Example, ProductRecord

finite = st.floats(-100, 100, width=32)
predictions = st.lists(st.tuples(st.sampled_from(KINDS), finite), max_size=60)


def fill(rows, limit, threshold=0.0, first=0):
    record = ProductRecord(limit, threshold)
    for number, (kind, score) in enumerate(rows, first):
        record.add(Example(f"{number}.png", kind, None if threshold is None else score > threshold, score))
    return record


@given(predictions, st.integers(1, 12))
def test_the_worst_come_first_and_nothing_worse_is_left_out(rows, limit):
    chosen = fill(rows, limit).chosen(limit)
    assert len(chosen) == min(limit, len(rows))
    wrong = [score for kind, score in rows if (kind == "normal") == (score > 0) and kind != "unlabelled"]
    is_wrong = [example.is_wrong for example in chosen]
    assert is_wrong == sorted(is_wrong, reverse=True)
    assert sum(is_wrong) == min(len(wrong), limit)
    for kind, sign in (("normal", 1), ("defect", -1), ("unlabelled", 1)):
        shown = [sign * example.score for example in chosen if example.kind == kind]
        # The most suspicious, or the most overlooked, of its kind.
        assert shown == sorted((sign * score for name, score in rows if name == kind), reverse=True)[: len(shown)]


@given(predictions, predictions, st.integers(1, 6))
def test_two_processes_together_are_as_one(mine, theirs, limit):
    together = fill([*mine, *theirs], limit)
    record = fill(mine, limit)
    record.merge(pickle.loads(pickle.dumps(fill(theirs, limit, first=len(mine)))))
    assert record.counts == together.counts
    assert [e.score for e in record.chosen(limit)] == [e.score for e in together.chosen(limit)]
    for kind in KINDS:
        scores = [score for name, score in [*mine, *theirs] if name == kind]
        assert list(record.scores[kind]) == scores
        assert record.counts[f"flagged {kind}"] == sum(score > 0 for score in scores)
    record.merge(fill(theirs, limit, first=len(mine)))  # seen twice, shown once
    paths = [example.path for example in record.chosen(limit)]
    assert len(paths) == len(set(paths))
