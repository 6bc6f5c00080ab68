"""The report of real runs."""

import base64
import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.models import Padim
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anomalib_decad.callbacks import Report


def report_of(engine):
    return (Path(engine.trainer.default_root_dir) / "report.html").read_text("utf-8")


def images_of(page):
    """The pictures of the images, which come before those of the heatmaps, by their name."""
    cards = re.findall(r'aria-label="[^"]*: ([^"]*)">.*?href="data:image/webp;base64,([^"]*)"', page, re.DOTALL)
    return {name: Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB") for name, content in cards}


def test_a_training_and_its_test_are_in_it(make_engine, make_model, make_data, mvtec_root, capsys):
    engine, model = make_engine(max_steps=4), make_model()
    engine.train(model, datamodule=make_data())
    page = report_of(engine)
    assert "Report: " in capsys.readouterr().out
    for text in ("DecAD on factory", "weights/lightning/model.ckpt", "4 steps, 12 images", "4 points from step 1 to 4",
                 "image_size", "12 of 12 images", "6 of 6 shown"):  # fmt: skip
        assert text in page
    assert str(mvtec_root) not in page
    images = images_of(page)
    assert sorted(images) == sorted(str(path.relative_to(mvtec_root)) for path in mvtec_root.glob("*/test/*/*.png"))
    for name, image in images.items():
        original = Image.open(mvtec_root / name).convert("RGB").resize(image.size)
        assert abs(np.asarray(image, float) - np.asarray(original, float)).mean() < 20


def test_the_training_is_that_of_the_checkpoint(make_engine, make_model, make_data):
    engine, model = make_engine(max_steps=4), make_model()
    engine.fit(model, datamodule=make_data())
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    resumed = make_engine(max_steps=7)
    resumed.fit(model, datamodule=make_data(), ckpt_path=checkpoint)
    resumed.test(model, datamodule=make_data())
    assert "7 points from step 1 to 7" in report_of(resumed)
    assert ">7 steps, 12 images" in report_of(resumed)
    alone, other = make_engine(max_steps=2), make_model()
    alone.test(other, datamodule=make_data(), ckpt_path=checkpoint)
    assert "4 points from step 1 to 4" in report_of(alone)
    # A training from the start has its own alone, and a prediction writes no report.
    alone.fit(other, datamodule=make_data())
    alone.test(other, datamodule=make_data())
    assert "2 points from step 1 to 2" in report_of(alone)
    (Path(alone.trainer.default_root_dir) / "report.html").unlink()
    alone.predict(other, datamodule=make_data())
    assert not list(Path(alone.trainer.default_root_dir).rglob("report.html"))


@given(st.integers(1, 3000))
def test_losses_are_bounded_and_evenly_spaced(steps):
    report, trainer = Report(), SimpleNamespace(ckpt_path=None)
    report.on_train_start(trainer, None)
    for step in range(1, steps + 1):
        logged = {"train_loss": torch.tensor(1.0), "train_loss_step": 1.0, "train/a": 2, "train_a_epoch": 1, "x": 2}
        trainer.global_step, trainer.callback_metrics = step, logged
        report.on_train_batch_end(trainer, None, None, None, step)
    training = report.state_dict()["training"]
    assert training["steps"] == steps
    assert set(training["losses"]) == {"loss", "a"}
    kept = list(training["losses"]["loss"])
    assert len(kept) <= 500
    assert kept == list(range(training["every"], steps + 1, training["every"]))


def test_one_that_is_given_takes_its_place(make_engine, make_model, make_data, capsys):
    engine = make_engine(Report(max_images=2, image_size=32))
    engine.train(make_model(post_processor=False, evaluator=False), datamodule=make_data())
    page = report_of(engine)
    assert capsys.readouterr().out.count("Report:") == 1
    assert page.count("2 of 6 shown") == 2
    assert max(max(image.size) for image in images_of(page).values()) == 32
    assert "3 points from step 1 to 3" in page
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
