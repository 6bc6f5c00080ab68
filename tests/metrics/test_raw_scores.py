"""Scores before the post-processor, and the threshold in their unit."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback

from anomalib_decad.decisions import CategoryPostProcessor
from anomalib_decad.metrics import CategoryEvaluator, RawScores, put_last, threshold_of

SCORES = torch.tensor([0.2, 7.0, -3.0, 7.5])


def make_batch(score=SCORES, maps=None):
    return ImageBatch(image=torch.zeros(len(SCORES), 3, 4, 4), pred_score=score, anomaly_map=maps)


def make_post_processor(threshold=1.0, low=0.0, high=4.0, **kwargs):
    post = PostProcessor(**kwargs)
    post._image_threshold.fill_(threshold)
    post.image_min.fill_(low)
    post.image_max.fill_(high)
    return post


def run(trainer, batch, hook="on_test_batch_end"):
    for callback in trainer.callbacks:
        getattr(callback, hook)(trainer, None, batch, batch, 0)


@pytest.mark.parametrize("hook", ["on_test_batch_end", "on_predict_batch_end"])
def test_they_are_those_before_the_post_processor(hook):
    trainer = SimpleNamespace(callbacks=[Callback(), make_post_processor(), Callback()])
    raw = RawScores.of(trainer)
    batch = make_batch()
    run(trainer, batch, hook)
    assert torch.equal(raw.scores, SCORES)
    assert batch.pred_score.max() <= 1


def test_all_who_ask_share_one():
    trainer = SimpleNamespace(callbacks=[make_post_processor()])
    assert RawScores.of(trainer) is RawScores.of(trainer)
    assert len(trainer.callbacks) == 2


@pytest.mark.parametrize("with_post_processor", [False, True])
def test_it_steps_in_front_and_the_list_that_is_iterated_over_stays(with_post_processor):
    raw, evaluator = RawScores(), CategoryEvaluator()
    post = [make_post_processor()] if with_post_processor else []
    given_list = [Callback(), *post, evaluator, raw]
    trainer = SimpleNamespace(callbacks=given_list)
    raw.setup(trainer, None, "test")
    assert given_list[-1] is raw
    assert len(trainer.callbacks) == len(given_list)
    if post:
        assert trainer.callbacks.index(raw) < trainer.callbacks.index(post[0])
    else:
        assert trainer.callbacks[0] is raw
    put_last(trainer, raw)
    assert trainer.callbacks[-1] is raw
    assert len(trainer.callbacks) == len(given_list)


def test_the_largest_value_of_the_map_where_there_is_no_score():
    trainer = SimpleNamespace(callbacks=[])
    raw = RawScores.of(trainer)
    maps = torch.rand(len(SCORES), 1, 5, 6)
    run(trainer, make_batch(None, maps))
    assert torch.equal(raw.scores, maps.amax((1, 2, 3)))
    run(trainer, make_batch(None))
    assert raw.scores is None


def test_a_score_that_is_changed_later_stays():
    trainer = SimpleNamespace(callbacks=[])
    raw = RawScores.of(trainer)
    score = SCORES.clone().unsqueeze(1)
    run(trainer, make_batch(score.squeeze(1)))
    score.zero_()
    assert torch.equal(raw.scores, SCORES)
    assert pickle.loads(pickle.dumps(raw)).scores is None
    raw.teardown(trainer, None, "test")
    assert raw.scores is None


finite = st.floats(-100, 100, width=32)


@given(
    scores=st.lists(finite, min_size=1, max_size=20), threshold=finite, low=finite, extent=st.floats(1, 50, width=32),
    sensitivity=st.floats(0.05, 0.95), normalizes=st.booleans(),
)  # fmt: skip
def test_labels_follow_the_threshold(scores, threshold, low, extent, sensitivity, normalizes):
    post = make_post_processor(
        threshold, low, low + extent, image_sensitivity=sensitivity, enable_normalization=normalizes
    )
    limit = threshold_of(post, "bolts")
    # Those at the threshold itself are on either side, as rounding wants.
    scores = torch.tensor([score for score in scores if abs(score - limit) > 1e-3] or [limit + 1.0])
    batch = ImageBatch(image=torch.zeros(len(scores), 3, 4, 4), pred_score=scores.clone())
    post.post_process_batch(batch)
    assert batch.pred_label.tolist() == (scores > limit).tolist()


@pytest.mark.parametrize(
    "post_processor",
    [None, torch.nn.Identity(), CategoryPostProcessor(), make_post_processor(enable_thresholding=False)],
)
def test_there_may_be_no_threshold(post_processor):
    assert threshold_of(post_processor) is None


def test_in_a_real_run(make_engine, make_model, make_data):
    class Reader(Callback):
        def setup(self, trainer, pl_module, stage):
            self.raw, self.seen = RawScores.of(trainer), []
            put_last(trainer, self)

        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            limit = threshold_of(pl_module.post_processor)
            assert batch.pred_label.tolist() == (self.raw.scores > limit).tolist()
            self.seen += self.raw.scores.tolist()

    reader = Reader()
    engine = make_engine(reader)
    engine.train(make_model(), datamodule=make_data())
    assert len(reader.seen) == 12
    assert sum(isinstance(callback, RawScores) for callback in engine.trainer.callbacks) == 1
