"""The report of real runs."""

import base64
import io
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from anomalib.data import MVTecAD
from anomalib.models import Padim
from PIL import Image

from anomalib_decad.report import Report
from conftest import anomalib


def report_of(engine):
    return (Path(engine.trainer.default_root_dir) / "report.html").read_text("utf-8")


def images_of(page):
    """The pictures of the images, which come before those of the heatmaps, by their name."""
    cards = re.findall(r'aria-label="[^"]*: ([^"]*)">.*?href="data:image/webp;base64,([^"]*)"', page, re.DOTALL)
    return {name: Image.open(io.BytesIO(base64.b64decode(content))) for name, content in cards}


def test_a_training_and_its_test_are_in_it(make_engine, make_model, make_data, mvtec_root, capsys):
    engine, model = make_engine(max_steps=4), make_model()
    engine.train(model, datamodule=make_data())
    page = report_of(engine)
    assert "Report: " in capsys.readouterr().out
    for text in ("DecAD on factory", "weights/lightning/model.ckpt", "4 steps", "12 images", 'id="loss-1-text"',
                 "4 points from step 1 to 4", "image_size", "12 of 12 images", "6 of 6 shown"):  # fmt: skip
        assert text in page
    assert str(mvtec_root) not in page
    images = images_of(page)
    assert sorted(images) == sorted(str(path.relative_to(mvtec_root)) for path in mvtec_root.glob("*/test/*/*.png"))
    for name, image in images.items():
        original = Image.open(mvtec_root / name).convert("RGB")
        assert image.width / image.height == pytest.approx(original.width / original.height, abs=0.03)
        difference = np.asarray(image.convert("RGB"), float) - np.asarray(original.resize(image.size), float)
        # The colours are those of the file, and not what the model was given.
        assert abs(difference.mean()) < 4
        assert abs(difference).mean() < 20


def test_a_test_alone_has_no_losses(make_engine, make_model, make_data):
    engine = make_engine()
    engine.fit(make_model(), datamodule=make_data())
    other = make_engine()
    other.test(make_model(), datamodule=make_data(), ckpt_path=engine.trainer.checkpoint_callback.best_model_path)
    page = report_of(other)
    assert "model.ckpt" in page
    assert 'id="loss-1-text"' not in page
    assert "12 of 12 images" in page


def test_a_resumed_training_has_all_its_losses(make_engine, make_model, make_data):
    engine = make_engine(max_steps=4)
    engine.fit(make_model(), datamodule=make_data())
    resumed, model = make_engine(max_steps=7), make_model()
    resumed.fit(model, datamodule=make_data(), ckpt_path=engine.trainer.checkpoint_callback.best_model_path)
    resumed.test(model, datamodule=make_data())
    page = report_of(resumed)
    assert "7 points from step 1 to 7" in page
    assert ", 7 steps" in page
    # A training from the start has its own alone.
    again = make_engine(max_steps=2)
    again.fit(model, datamodule=make_data())
    again.test(model, datamodule=make_data())
    assert "2 points from step 1 to 2" in report_of(again)


def test_the_losses_of_a_tested_checkpoint_are_not_those_of_the_next_training(make_engine, make_model, make_data):
    engine, model = make_engine(max_steps=4), make_model()
    engine.fit(make_model(), datamodule=make_data())
    other = make_engine(max_steps=2)
    other.test(model, datamodule=make_data(), ckpt_path=engine.trainer.checkpoint_callback.best_model_path)
    other.fit(model, datamodule=make_data())
    other.test(model, datamodule=make_data())
    assert "2 points from step 1 to 2" in report_of(other)


def test_it_can_be_switched_off(make_engine, make_model, make_data, capsys):
    engine = make_engine()
    engine.train(make_model(report=False), datamodule=make_data())
    assert not list(Path(engine.trainer.default_root_dir).rglob("report.html"))
    assert "Report:" not in capsys.readouterr().out


def test_one_that_is_given_takes_its_place(make_engine, make_model, make_data, capsys):
    engine = make_engine(Report(max_images=2, image_size=32))
    model = make_model()
    engine.train(model, datamodule=make_data())
    page = report_of(engine)
    assert capsys.readouterr().out.count("Report:") == 1
    assert page.count("2 of 6 shown") == 2
    assert max(max(image.size) for image in images_of(page).values()) == 32
    assert "3 points from step 1 to 3" in page


@pytest.mark.parametrize("arguments", [{"max_images": 0}, {"image_size": -1}])
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be positive"):
        Report(**arguments)


def test_parts_that_are_switched_off(make_engine, make_model, make_data):
    engine = make_engine()
    engine.train(make_model(post_processor=False, evaluator=False), datamodule=make_data())
    page = report_of(engine)
    assert "There is no threshold" in page
    assert "evaluator=CategoryEvaluator()" in page


@pytest.mark.slow
@pytest.mark.parametrize("many", [False, True])
def test_with_another_model(many, make_engine, make_data, mvtec_root):
    data = make_data() if many else MVTecAD(root=mvtec_root, category="bolts", num_workers=0)
    engine = make_engine(Report(), max_epochs=1)
    model = Padim(backbone="resnet18", pre_trained=False, layers=["layer1"], n_features=8, visualizer=False)
    engine.train(model, datamodule=data)
    page = report_of(engine)
    assert "evaluator=CategoryEvaluator()" in page
    assert ('id="product-1"' in page) == many
    assert page.count("6 of 6 shown") == (2 if many else 1)


def test_it_can_be_pickled():
    assert pickle.loads(pickle.dumps(Report(max_images=7))).max_images == 7


@pytest.mark.slow
def test_the_command_writes_it_and_says_where(tmp_path, data_args, encoder_weights):
    arguments = [
        "--model", "DecAD", "--model.encoder", "test_vit", "--model.encoder_weights", encoder_weights,
        "--model.layers", "[1,2]", "--model.image_size", "[64,64]", *data_args, "--trainer.accelerator", "cpu",
        "--default_root_dir", tmp_path,
    ]  # fmt: skip
    result = anomalib("train", *arguments, "--trainer.max_steps", 2)
    (path,) = tmp_path.rglob("report.html")
    assert f"Report: {path}" in result.stdout
    assert "2 points from step 1 to 2" in path.read_text()
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    result = anomalib("test", *arguments, "--ckpt_path", checkpoint)
    assert "tests/v0/report.html" in result.stdout
    (path,) = tmp_path.rglob("tests/v0/report.html")
    assert "12 of 12 images" in path.read_text()
    anomalib("test", *arguments, "--ckpt_path", checkpoint, "--model.report", "false")
    assert not list(tmp_path.rglob("tests/v1/report.html"))
