"""The thresholds beside an export."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalib_decad.decisions import CategoryPostProcessor, Limits, exported_thresholds
from anomalib_decad.decisions.thresholds_file import is_threshold, read_thresholds
from conftest import validated


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("names", [[], ["bolt"], ["bolt", "nut"]])
def test_what_is_written_can_be_read(normalized, names, tmp_path):
    post_processor = CategoryPostProcessor(enable_normalization=normalized)
    for content in (exported_thresholds(post_processor), exported_thresholds(validated(post_processor, names))):
        path = tmp_path / "model.thresholds.json"
        path.write_text(json.dumps(content))
        assert read_thresholds(path) == content
    assert [row["name"] for row in content["categories"]] == names
    assert content["unit"] == ("normalized" if normalized else "raw")


@given(threshold=st.floats(-5, 5), extent=st.floats(0.1, 5), sensitivity=st.floats(0, 1))
def test_a_raw_threshold_is_what_is_normalized_to_one_minus_the_sensitivity(threshold, extent, sensitivity):
    limits = Limits(threshold, -extent / 2, extent / 2, threshold, 0.0, extent)
    for kind in ("image", "pixel"):
        raw = limits.raw_threshold(kind, sensitivity)
        assert (raw - threshold) / extent + 0.5 == pytest.approx(1 - sensitivity, abs=1e-6)


def test_before_a_validation_there_is_none():
    assert Limits().raw_threshold("image", 0.5) is None
    assert is_threshold(None, "raw")
    assert not is_threshold(None, "normalized")
    assert not is_threshold(float("nan"), "raw")
    assert not is_threshold(1.5, "normalized")
