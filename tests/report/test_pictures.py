"""Small pictures and contours."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anomalib_decad.report.pictures import contours_of, data_uri, draw, heatmap

sides = st.integers(1, 90)


def decode(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


@given(height=sides, width=sides, channels=st.sampled_from([1, 3, 4]), size=st.integers(8, 64))
def test_the_longer_side_is_bounded_for_any_image(height, width, channels, size):
    image, maps = torch.rand(channels, height, width), torch.rand(1, height, width)
    picture = draw(image, maps, maps[0] > 0.5, maps[0] > 0.9, size)
    longest = max(min(size, max(height, width)), 8)
    assert max(picture.width, picture.height) <= longest
    assert decode(picture.image).shape == (picture.height, picture.width, 3)
    assert max(picture.heat.shape) <= longest
    assert decode(heatmap(picture, 0.0, 1.0)).max() <= 255


@pytest.mark.parametrize(("aspect", "shape"), [(2.0, (20, 40)), (0.5, (40, 20)), (None, (40, 40))])
def test_a_picture_has_the_proportions_of_the_file(aspect, shape):
    picture = draw(torch.rand(3, 80, 80), size=40, aspect=aspect)
    assert (picture.height, picture.width) == shape


def test_colours_are_those_of_the_image():
    image = torch.tensor([0.9, 0.5, 0.1]).reshape(3, 1, 1).expand(3, 64, 64)
    assert decode(draw(image, size=32).image).mean((0, 1)) == pytest.approx([230, 128, 26], abs=8)
    gray = torch.full((1, 64, 64), 0.5)
    assert decode(draw(gray, size=32).image).mean((0, 1)) == pytest.approx([128] * 3, abs=4)


@given(st.floats(-50, 50), st.just(0.0) | st.floats(0.01, 50))
def test_a_heatmap_becomes_brighter_with_the_value(low, extent):
    ramp = torch.linspace(low, low + extent, 64).expand(32, 64)
    colours = decode(heatmap(draw(torch.rand(3, 32, 64), ramp), low, low + extent))
    brightness = colours.mean((0, 2))
    if extent:
        assert brightness[-1] > brightness[32] > brightness[0]
    assert brightness[0] < 20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_map_that_is_not_finite_is_drawn(value):
    picture = draw(torch.rand(3, 16, 16), torch.full((16, 16), value))
    assert heatmap(picture, 0.0, 1.0)


def test_the_contour_surrounds_the_mask():
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[10:20, 4:8] = True
    path = contours_of(mask, 80, 80)
    assert path.count("M") == 1
    numbers = np.array(path.replace("M", "").replace("Z", "").replace("L", " ").split(), float).reshape(-1, 2)
    assert numbers.min(0).tolist() == [9.0, 21.0]
    assert numbers.max(0).tolist() == [15.0, 39.0]
    assert contours_of(mask & False, 80, 80) == ""


def test_the_contours_of_noise_are_bounded():
    path = contours_of(torch.rand(600, 600) > 0.5, 224, 224)
    assert 0 < len(path) < 20_000


def test_a_hole_has_a_contour_and_one_pixel_too():
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[5:15, 5:15] = False
    assert contours_of(mask, 20, 20).count("M") == 2
    one = torch.zeros(20, 20, dtype=torch.bool)
    one[3, 4] = True
    assert contours_of(one, 20, 20) == "M4.5 3.5Z"


def test_an_address_has_only_letters_that_need_no_escape():
    assert set(data_uri(bytes(range(256)))) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/=:;,"
    )
