"""Defaults that follow from the machine, and pictures that can be read."""

import os

import pytest
from PIL import Image, ImageDraw, ImageFont

from anomalib_decad import MultiCategory
from anomalib_decad.data import CategoryVisualizer


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 2), (64, 8)])
def test_no_more_workers_than_cores(cores, expected, mvtec_root, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert MultiCategory("MVTecAD", root=mvtec_root).num_workers == expected
    assert MultiCategory("MVTecAD", root=mvtec_root, num_workers=3).num_workers == 3


@pytest.mark.parametrize("side", [128, 256, 512])
def test_titles_fit_into_their_pictures(side):
    size = CategoryVisualizer(field_size=(side, side)).text_config["size"]
    font = ImageFont.load_default(size=size)
    right = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((10, 10), "Image + Anomaly Map", font=font)[2]
    assert right + 3 <= side
    assert size >= 8


def test_the_users_size_of_titles_stays():
    assert CategoryVisualizer(text_config={"size": 30}).text_config["size"] == 30
