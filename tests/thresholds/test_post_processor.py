"""Each product has thresholds of its own, exact and in bounded memory."""

import io
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.trainer.states import TrainerFn
from sklearn.metrics import f1_score

from anomalib_decad.components import CategoryPrediction
from anomalib_decad.data import CategoryBatch
from anomalib_decad.thresholds import (
    BestF1,
    CategoryPostProcessor,
    FalseAlarmRate,
    FixedThreshold,
    Limits,
    exported_thresholds,
)
from anomalib_decad.thresholds.validation_scores import ValidationScores
from conftest import validated

SIZE = (8, 8)


def make_batch(categories, scores, labels, maps=None, masks=None):
    length = len(scores)
    scores = torch.as_tensor(scores, dtype=torch.float32)
    maps = scores[:, None, None].expand(length, *SIZE).clone() if maps is None else maps
    labels = torch.as_tensor(labels)
    masks = labels[:, None, None].expand(length, *SIZE) if masks is None else masks
    fields = {"image": torch.zeros(length, 3, *SIZE), "gt_label": labels, "gt_mask": masks}
    cls = ImageBatch if categories is None else CategoryBatch
    extra = {} if categories is None else {"category": list(categories)}
    return cls(**fields, **extra, pred_score=scores, anomaly_map=maps)


FIT = SimpleNamespace(world_size=1, state=SimpleNamespace(fn=TrainerFn.FITTING))
ALONE = SimpleNamespace(world_size=1, state=SimpleNamespace(fn=TrainerFn.VALIDATING))


def validate(post_processor, *batches, recognized=(), trainer=FIT):
    module = SimpleNamespace(model=SimpleNamespace(recognizer=SimpleNamespace(names=list(recognized))))
    post_processor.on_validation_epoch_start(trainer, module)
    for batch in batches:
        post_processor.on_validation_batch_end(trainer, module, batch, batch, 0)
    post_processor.on_validation_epoch_end(trainer, module)
    return post_processor


def two_products(seed=0, count=60):
    """Products whose scores differ so much that one threshold cannot serve both."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3 == 0
    noise = torch.randn(2, count, generator=generator)
    return [
        make_batch(["bolt"] * count, 0.2 + 0.01 * noise[0] + 0.05 * labels, labels),
        make_batch(["nut"] * count, 0.6 + 0.05 * noise[1] + 0.2 * labels, labels),
    ]


def decided(post_processor, batch):
    post_processor.post_process_batch(batch)
    return batch


def test_each_product_has_the_best_threshold_of_its_own():
    post_processor = validate(CategoryPostProcessor(), *two_products())
    plain = validate(CategoryPostProcessor(), *(make_batch(None, b.pred_score, b.gt_label) for b in two_products()))
    for batch in two_products():
        scores, labels = batch.pred_score.numpy().copy(), batch.gt_label.numpy()
        best = max(f1_score(labels, scores >= value) for value in scores)
        assert f1_score(labels, decided(post_processor, batch).pred_label) == pytest.approx(best)
    # One threshold cannot do that.
    worst = min(f1_score(b.gt_label, decided(plain, b).pred_label) for b in two_products())
    assert worst < 0.7


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5, width=32), st.booleans()), min_size=1, max_size=40), st.floats(0.05, 0.95))
def test_one_product_is_decided_as_anomalib_decides(pairs, sensitivity):
    """Given the same thresholds and ranges, scores, maps, labels and masks are equal."""
    scores, labels = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
    mine = validate(
        CategoryPostProcessor(image_sensitivity=sensitivity), make_batch(["nut"] * len(pairs), scores, labels)
    )
    theirs = PostProcessor(image_sensitivity=sensitivity)
    limits = mine.limits("nut")
    assert limits == mine.limits()
    assert (limits.image_min, limits.image_max) == (scores.min(), scores.max())
    theirs._image_threshold.fill_(limits.image_threshold)
    theirs._pixel_threshold.fill_(limits.pixel_threshold)
    for name in ("image_min", "image_max", "pixel_min", "pixel_max"):
        getattr(theirs, name).fill_(getattr(limits, name))
    mixed = make_batch(["nut"] * len(pairs), scores, labels), make_batch(None, scores, labels)
    for result in (decided(mine, mixed[0]), decided(mine, mixed[1])):
        expected = decided(theirs, make_batch(None, scores, labels))
        torch.testing.assert_close(result.pred_score, expected.pred_score)
        torch.testing.assert_close(result.anomaly_map, expected.anomaly_map)
        assert torch.equal(result.pred_label, expected.pred_label)
        assert torch.equal(result.pred_mask, expected.pred_mask)


def test_the_graph_decides_as_the_batch_does():
    post_processor = validate(CategoryPostProcessor(), *two_products(), recognized=["bolt", "nut"])
    scores = torch.tensor([0.2, 0.26, 0.6, 0.9, 0.4])
    names = ["bolt", "bolt", "nut", "nut", "screw"]
    batch = decided(post_processor, make_batch(names, scores, [False] * 5))
    maps = scores[:, None, None, None].expand(5, 1, *SIZE)
    result = post_processor(CategoryPrediction(scores, None, maps, None, torch.tensor([0, 0, 1, 1, -1])))
    assert type(result) is InferenceBatch
    assert torch.equal(result.pred_score, batch.pred_score)
    assert torch.equal(result.pred_label, batch.pred_label)
    assert torch.equal(result.pred_mask.squeeze(1), batch.pred_mask)
    assert result.pred_label.tolist()[:4] == [False, True, False, True]
    post_processor.category_output = True
    assert post_processor(CategoryPrediction(scores, None, maps, None, torch.arange(5) % 2)).category.tolist() == [
        0, 1, 0, 1, 0,
    ]  # fmt: skip


def test_a_recognized_product_without_validation_images_has_the_limits_of_all(caplog):
    post_processor = validate(CategoryPostProcessor(), *two_products(), recognized=["washer", "nut", "bolt"])
    assert "No validation image of washer: the thresholds are those of all products together" in caplog.text
    assert post_processor.categories == ["washer", "nut", "bolt"]
    assert post_processor.limits("washer") == post_processor.limits()
    assert post_processor.limits("nut") != post_processor.limits()


def test_what_is_recognized_before_a_validation_has_no_name():
    batch = make_batch(None, [0.5, 0.6], [False, True])
    batch.category_index = torch.tensor([0, 1])
    assert CategoryPostProcessor().categories_of(batch) == []
    post_processor = validate(CategoryPostProcessor(), *two_products(), recognized=["bolt", "nut"])
    assert post_processor.categories_of(batch) == ["bolt", "nut"]


def test_a_category_can_be_given():
    batches = two_products()
    post_processor = validate(CategoryPostProcessor(category="nut"), *batches)
    scores = torch.tensor([0.6, 0.9])
    result = post_processor(CategoryPrediction(scores, category=torch.tensor([0, 0])))
    assert result.pred_label.tolist() == [False, True]
    # What a batch says comes first.
    assert decided(post_processor, make_batch(["bolt"], [0.6], [False])).pred_label.item()
    post_processor.category = "screw"
    with pytest.raises(ValueError, match="no category 'screw': there are bolt, nut"):
        post_processor(CategoryPrediction(scores))
    with pytest.raises(ValueError, match="'screw': the model was never validated"):
        CategoryPostProcessor(category="screw")(CategoryPrediction(scores))


def test_only_normal_images(caplog):
    scores = torch.rand(30, generator=torch.Generator().manual_seed(0))
    batch = make_batch(["nut"] * 30, scores, [False] * 30)
    limits = validate(CategoryPostProcessor(), batch).limits("nut")
    assert limits.image_threshold > scores.max()
    assert "No defect among the validation images of nut" in caplog.text
    assert "Too few normal validation images of nut" in caplog.text
    caplog.clear()
    loose = validate(CategoryPostProcessor(FalseAlarmRate(0.2)), batch).limits("nut")
    assert (scores > loose.image_threshold).float().mean() <= 0.2 * 31 / 30
    assert not caplog.messages


def test_only_defects(caplog):
    post_processor = validate(CategoryPostProcessor(), make_batch(["nut"] * 3, [0.5, 0.6, 0.7], [True] * 3))
    batch = decided(post_processor, make_batch(["nut"] * 2, [0.5, 0.4], [True, False]))
    assert batch.pred_label.tolist() == [True, False]
    assert "Nothing normal among the validation images of nut" in caplog.text


def test_one_image():
    post_processor = validate(CategoryPostProcessor(), make_batch(["nut"], [0.5], [False]), *two_products())
    batch = decided(post_processor, make_batch(["nut"], [0.5], [False]))
    assert torch.isfinite(batch.pred_score).all()
    alone = validate(CategoryPostProcessor(), make_batch(["nut"], [0.5], [False]))
    assert not decided(alone, make_batch(["nut"], [0.5], [False])).pred_label.item()


def test_a_fixed_threshold():
    post_processor = validate(CategoryPostProcessor(FixedThreshold(0.7)), *two_products())
    assert post_processor.limits("bolt").image_threshold == pytest.approx(0.7)
    batch = decided(post_processor, make_batch(["bolt"] * 2, [0.69, 0.71], [False] * 2))
    assert batch.pred_label.tolist() == [False, True]


def test_a_changed_threshold_is_saved():
    post_processor = validate(CategoryPostProcessor(FalseAlarmRate(0.05), BestF1(0.01)), *two_products())
    post_processor.set_threshold("nut", image=0.9, pixel=0.8)
    post_processor.set_threshold(image=0.5)
    file = io.BytesIO()
    torch.save((post_processor.state_dict(), post_processor.checkpoint_config()), file)
    file.seek(0)
    state, config = torch.load(file, weights_only=True)
    other = CategoryPostProcessor()
    other.load_checkpoint_config(config)
    other.load_state_dict(state)
    assert other.categories == ["bolt", "nut"]
    assert other.image_policy == FalseAlarmRate(0.05)
    for name in (None, "bolt", "nut"):
        assert other.limits(name) == post_processor.limits(name)
    assert other.limits("nut").image_threshold == pytest.approx(0.9)
    assert other.limits("nut").pixel_threshold == pytest.approx(0.8)
    assert other.limits().image_threshold == pytest.approx(0.5)
    assert other.limits("bolt").image_threshold != pytest.approx(0.9)
    with pytest.raises(ValueError, match="no category 'screw': there are bolt, nut"):
        other.set_threshold("screw", image=0.1)
    with pytest.raises(ValueError, match="must be finite"):
        other.set_threshold("nut", image=math.inf)


def test_processes_find_what_one_finds(monkeypatch):
    """Any split of the images over processes gives the same limits."""
    scores = sys.modules[ValidationScores.__module__]
    whole = validate(CategoryPostProcessor(), *two_products(count=40))
    parts = []
    for rank in range(3):
        part = CategoryPostProcessor()
        for batch in two_products(count=40):
            rows = range(rank, 40, 3)
            piece = make_batch([batch.category[r] for r in rows], batch.pred_score[rows], batch.gt_label[rows])
            part.on_validation_batch_end(ALONE, None, piece, piece, 0)
        parts.append(part._scores.products)
    monkeypatch.setattr(scores, "gather", lambda _: parts)
    gathered = validate(CategoryPostProcessor())
    for name in (None, "bolt", "nut"):
        assert gathered.limits(name) == whole.limits(name)


def test_a_validation_of_some_products_leaves_the_others_alone(caplog):
    nut, bolt = (make_batch([name] * 4, [1.0, 2.0, 3.0, 4.0], [False, False, True, True]) for name in ("nut", "bolt"))
    post_processor = validate(CategoryPostProcessor(), nut, bolt)
    nuts = post_processor.limits("nut")
    again = make_batch(["bolt", "screw"] * 2, [5.0, 6.0, 7.0, 8.0], [False, False, True, True])
    validate(post_processor, again, trainer=ALONE)
    assert post_processor.limits("nut") == nuts
    assert post_processor.limits("bolt").image_threshold == pytest.approx(6.0)
    assert post_processor.limits("screw").image_threshold == pytest.approx(7.0)
    assert "No validation image of nut: the thresholds are as they were before." in caplog.text
    # In a fit the weights are others.
    validate(post_processor, again)
    assert post_processor.categories == ["bolt", "screw"]


def test_what_a_validation_in_inference_mode_found_can_be_changed():
    post_processor = CategoryPostProcessor()
    with torch.inference_mode():
        validate(post_processor, make_batch(["nut"] * 2, [1.0, 2.0], [False, True]), trainer=ALONE)
    assert not any(buffer.is_inference() for buffer in post_processor.buffers())
    post_processor.set_threshold("nut", image=3.0)
    assert post_processor.limits("nut").image_threshold == 3.0


def test_images_of_no_category_are_anomalibs():
    """With one product and anomalib's datamodule there are no categories."""
    (first, _) = two_products()
    post_processor = validate(CategoryPostProcessor(), make_batch(None, first.pred_score, first.gt_label))
    assert post_processor.categories == []
    assert not post_processor.categories_of(make_batch(None, [0.5], [False]))
    assert not math.isnan(post_processor.image_threshold)


def test_without_masks_the_threshold_of_images_is_that_of_pixels():
    batch = two_products()[0]
    batch.gt_mask = None
    limits = validate(CategoryPostProcessor(), batch).limits("bolt")
    assert limits.pixel_threshold == limits.image_threshold
    limits = validate(CategoryPostProcessor(enable_threshold_matching=False), batch).limits("bolt")
    assert math.isnan(limits.pixel_threshold)


def test_a_model_may_give_maps_alone_and_was_perhaps_never_validated():
    maps = torch.rand(2, 1, *SIZE)
    score = CategoryPostProcessor(category_output=True)(InferenceBatch(anomaly_map=maps)).pred_score
    assert torch.equal(score.flatten(), maps.amax((1, 2, 3)))
    with pytest.raises(ValueError, match="neither a pred_score nor an anomaly_map"):
        CategoryPostProcessor()(InferenceBatch())


def test_parts_that_are_switched_off():
    raw = validate(CategoryPostProcessor(enable_normalization=False), *two_products())
    batch = decided(raw, make_batch(["nut"] * 2, [0.6, 0.9], [False] * 2))
    assert batch.pred_score.tolist() == pytest.approx([0.6, 0.9])
    assert batch.pred_label.tolist() == [False, True]
    scores = validate(CategoryPostProcessor(enable_thresholding=False), *two_products())
    assert decided(scores, make_batch(["nut"], [0.6], [False])).pred_label is None


def test_a_model_that_learned_other_products_keeps_the_limits_of_those_it_has():
    post_processor = validate(CategoryPostProcessor(), *two_products())
    before = post_processor.limits("nut")
    post_processor.follow(["nut", "washer"])
    assert post_processor.limits("nut") == before
    assert post_processor.limits("washer") == post_processor.limits()
    assert Limits._fields[0] == "image_threshold"
    assert np.isfinite(post_processor.category_limits.numpy()).all()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_few_normal_images_give_a_threshold_that_defects_exceed(count):
    scores = 0.3 + 0.1 * torch.arange(count) / (count - 1)
    limits = validate(CategoryPostProcessor(), make_batch(["nut"] * count, scores, [False] * count)).limits("nut")
    assert scores.max() < limits.image_threshold < 1


def test_some_images_may_have_no_product():
    post_processor = validate(CategoryPostProcessor(), *two_products())
    joint = post_processor.limits().image_threshold
    batch = decided(post_processor, make_batch(["nut", None, "screw"], [0.9, joint, joint], [False] * 3))
    assert batch.pred_score[1:].tolist() == pytest.approx([0.5, 0.5], abs=1e-5)


def test_half_precision_decides_as_single_does():
    post_processor = validate(CategoryPostProcessor(), *two_products())
    threshold = post_processor.limits("nut").image_threshold
    scores = torch.tensor([threshold - 0.01, threshold + 0.01]).half()
    assert post_processor._decide(scores, None, torch.tensor([1, 1])).pred_label.tolist() == [False, True]


def test_a_score_that_is_no_number_is_not_normal():
    post_processor = validate(CategoryPostProcessor(), *two_products())
    scores = torch.tensor([math.nan, math.nan])
    assert post_processor._decide(scores, None, torch.tensor([0, -1])).pred_label.all()


def test_scores_that_are_not_finite_are_refused():
    batch = make_batch(["nut"], [math.inf], [False])
    batch.gt_label = None
    with pytest.raises(ValueError, match="scores must be finite"):
        validate(CategoryPostProcessor(), batch)


def test_an_export_for_one_product_has_its_thresholds_alone():
    post_processor = validate(CategoryPostProcessor(category="nut"), *two_products())
    assert [row["name"] for row in exported_thresholds(post_processor)["categories"]] == ["nut"]
    assert post_processor.raw_threshold("image") == pytest.approx(post_processor.limits("nut").image_threshold)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("names", [[], ["bolt"], ["bolt", "nut"]])
def test_each_product_has_a_row(normalized, names):
    post_processor = CategoryPostProcessor(enable_normalization=normalized)
    before = exported_thresholds(post_processor)
    assert before["unit"] == "raw"
    assert before["image"] is before["pixel"] is None
    content = exported_thresholds(validated(post_processor, names))
    assert json.loads(json.dumps(content)) == content
    assert [(row["index"], row["name"]) for row in content["categories"]] == list(enumerate(names))
    assert content["unit"] == ("normalized" if normalized else "raw")
    assert content["image"] == (0.5 if normalized else 0.25)


@given(threshold=st.floats(-5, 5), extent=st.floats(0.1, 5), sensitivity=st.floats(0, 1))
def test_a_raw_threshold_is_what_is_normalized_to_one_minus_the_sensitivity(threshold, extent, sensitivity):
    post_processor = CategoryPostProcessor(image_sensitivity=sensitivity, pixel_sensitivity=sensitivity)
    for kind in ("image", "pixel"):
        getattr(post_processor, f"{kind}_min").fill_(-extent / 2)
        getattr(post_processor, f"{kind}_max").fill_(extent / 2)
    post_processor.set_threshold(image=threshold, pixel=threshold)
    for kind in ("image", "pixel"):
        raw = post_processor.raw_threshold(kind)
        assert (raw - threshold) / extent + 0.5 == pytest.approx(1 - sensitivity, abs=1e-5)
