"""The report of real runs."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from anomalib.data import MVTecAD
from anomalib.models import Padim
from PIL import Image

from anomalib_decad.callbacks import Report


def report_of(engine):
    return (Path(engine.trainer.default_root_dir) / "report.html").read_text("utf-8")


def images_of(page):
    """The pictures of the images, which come before those of the heatmaps, by their name."""
    cards = re.findall(r'aria-label="[^"]*: ([^"]*)">.*?href="data:image/webp;base64,([^"]*)"', page, re.DOTALL)
    return {name: Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB") for name, content in cards}


def test_what_a_test_has_found_is_in_it(make_engine, make_model, make_data, mvtec_root, capsys):
    engine = make_engine()
    engine.train(make_model(), datamodule=make_data())
    page = report_of(engine)
    assert "Report: " in capsys.readouterr().out
    for text in ("DecAD on factory", "weights/lightning/model.ckpt", "image_size", "12 of 12 images", "6 of 6 shown"):
        assert text in page
    assert str(mvtec_root) not in page
    images = images_of(page)
    assert sorted(images) == sorted(str(path.relative_to(mvtec_root)) for path in mvtec_root.glob("*/test/*/*.png"))
    for name, image in images.items():
        original = Image.open(mvtec_root / name).convert("RGB").resize(image.size)
        assert abs(np.asarray(image, float) - np.asarray(original, float)).mean() < 20


def test_one_that_is_given_takes_its_place(make_engine, make_model, make_data, capsys):
    engine = make_engine(Report(max_images=2, image_size=32))
    engine.train(make_model(post_processor=False, evaluator=False), datamodule=make_data())
    page = report_of(engine)
    assert capsys.readouterr().out.count("Report:") == 1
    assert page.count("2 of 6 shown") == 2
    assert max(max(image.size) for image in images_of(page).values()) == 32
    assert "There is no threshold" in page
    assert "evaluator=CategoryEvaluator()" in page


def test_it_can_be_switched_off(make_engine, make_model, make_data):
    engine = make_engine()
    engine.train(make_model(report=False), datamodule=make_data())
    assert not list(Path(engine.trainer.default_root_dir).rglob("report.html"))


@pytest.mark.parametrize("name", ["max_images", "image_size"])
def test_arguments_out_of_range(name):
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        Report(**{name: 0})


@pytest.mark.slow
def test_with_another_model(make_engine, mvtec_root):
    data = MVTecAD(root=mvtec_root, category="bolts", num_workers=0)
    engine = make_engine(Report(), max_epochs=1)
    model = Padim(backbone="resnet18", pre_trained=False, layers=["layer1"], n_features=8, visualizer=False)
    engine.train(model, datamodule=data)
    page = report_of(engine)
    assert all(part in page for part in ("chosen on these test images", "normalized by anomalib", "6 of 6 shown"))
