"""The thresholds beside an export."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalib_decad.thresholds import CategoryPostProcessor, exported_thresholds
from conftest import validated


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
