"""Small pictures and contours."""

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize

from anomalib_decad.callbacks.report.pictures import draw, heatmap

sides = st.integers(1, 90)


def decode(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")).astype(int)


def picture(image, size=64, path=None, transform=None, **fields):
    batch = SimpleNamespace(image=image[None], image_path=[path], **{name: f[None] for name, f in fields.items()})
    return draw(SimpleNamespace(pre_processor=SimpleNamespace(transform=transform)), batch, 0, size)


def points(path):
    return np.array(path.replace("M", "").replace("Z", " ").replace("L", " ").split(), float).reshape(-1, 2)


@settings(deadline=None)
@given(height=sides, width=sides, channels=st.sampled_from([1, 3, 4]), size=st.integers(8, 64))
def test_the_longer_side_is_bounded_for_any_image(height, width, channels, size):
    image, maps = torch.rand(channels, height, width), torch.rand(1, height, width)
    maps[0, 0, 0] = float("nan")
    drawn = picture(image, size, anomaly_map=maps, gt_mask=maps[0] > 0.5, pred_mask=maps > 0.9)
    assert max(drawn.size) <= max(min(size, max(height, width, channels)), 8)
    assert decode(drawn.image).shape == (*drawn.size[::-1], 3)
    assert max(drawn.heat.shape) <= max(drawn.size)
    assert (points(drawn.truth + drawn.found) <= drawn.size).all()


@pytest.mark.parametrize(("transform", "size"), [(None, (40, 20)), (CenterCrop(80), (40, 40))])
def test_a_picture_has_the_proportions_of_the_file(transform, size, tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "image.png")
    assert picture(torch.rand(3, 80, 80), 40, tmp_path / "image.png", transform).size == size


def test_colors_are_those_before_the_normalization():
    color = torch.tensor([0.9, 0.5, 0.1]).reshape(3, 1, 1).expand(3, 64, 64)
    step = Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.1])
    for image, transform in ((color, None), (step(color), Compose([step]))):
        assert decode(picture(image, transform=transform).image).mean((0, 1)) == pytest.approx([230, 128, 26], abs=8)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-50.0, -49.0), (3.0, 3e4)])
def test_a_heatmap_becomes_brighter_with_the_value(low, high):
    heat = picture(torch.rand(3, 32, 64), anomaly_map=torch.linspace(low, high, 64).expand(32, 64)).heat
    brightness = decode(heatmap(heat, low, high)).mean((0, 2))
    assert brightness[-1] > brightness[len(brightness) // 2] > brightness[0]


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), st.integers(1, 9))
def test_the_contour_surrounds_the_mask(top, left, height, width):
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[..., top : top + height, left : left + width] = True
    path = picture(torch.rand(3, 80, 80), 80, pred_mask=mask).found
    assert path.count("M") == 1
    assert points(path).min(0) == pytest.approx([2 * left + 1, 2 * top + 1], abs=1)
    assert points(path).max(0) == pytest.approx([2 * (left + width) - 1, 2 * (top + height) - 1], abs=1)


def test_empty_masks_have_no_contours_and_those_of_noise_are_bounded():
    drawn = picture(torch.rand(3, 300, 300), 224, gt_mask=torch.zeros(9, 9), pred_mask=torch.rand(600, 600) > 0.5)
    assert drawn.truth == ""
    assert 0 < len(drawn.found) < 20_000
