"""A folder to predict: what is left out, what is read again, and where its images are below what is above all."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import Folder, PredictDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from anomalib_decad import MultiCategory
from anomalib_decad.data import CategoryVisualizer, PredictionFolder, PredictionRoot, absolute
from conftest import make_dataset


def trainer_of(files, predicting=True):
    loader = SimpleNamespace(dataset=SimpleNamespace(image_filenames=files))
    return SimpleNamespace(predicting=predicting, testing=False, predict_dataloaders=loader)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["..", ".", "a", "b", "c"]), min_size=1, max_size=5), min_size=1, max_size=5))
def test_nothing_leads_out_of_the_folder_and_images_stay_apart(folders):
    files = [str(Path("photos", *parts, "x.png")) for parts in folders]
    root, trainer = PredictionRoot(), trainer_of(files)
    below = [root.below(trainer, file) for file in files]
    assert all(path is not None and ".." not in path.parts and not path.is_absolute() for path in below)
    assert len(set(below)) == len({absolute(file) for file in files})


@pytest.mark.parametrize(
    ("trainer", "path"),
    [
        (trainer_of(["/photos/a/x.png"], predicting=False), "/photos/a/x.png"),
        (trainer_of(["/photos/a/x.png"]), ""),
        (trainer_of(["/photos/a/x.png"]), "/elsewhere/x.png"),
        (trainer_of(["/photos/a/x.png"]), "/photos/../elsewhere/x.png"),
        (trainer_of([]), "/photos/a/x.png"),
    ],
)
def test_what_is_not_in_the_folder_has_no_place(trainer, path):
    assert PredictionRoot().below(trainer, path) is None


class Model(LightningModule):
    """Finds nothing."""

    def predict_step(self, batch, batch_idx):
        count, _, height, width = batch.image.shape
        return batch.update(pred_score=torch.zeros(count), anomaly_map=torch.zeros(count, 1, height, width))

    test_step = predict_step


def predict(path, white_levels=None):
    """Predict images, and give the callback and the batch."""
    callback, model, dataset = PredictionFolder(), Model(), PredictDataset(path)
    if white_levels:
        model.white_levels = white_levels
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=dataset.collate_fn)
    (batch,) = make_trainer(callback).predict(model, loader)
    return callback, batch


def make_trainer(*callbacks, folder=None):
    options = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(callbacks=list(callbacks), default_root_dir=folder, **options)


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def test_files_that_cannot_be_read_are_left_out(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    for name in ("a.png", "b.png", "c.png"):
        write(tmp_path / name, noise)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    callback, batch = predict(tmp_path)
    assert [Path(path).name for path in batch.image_path] == ["a.png", "c.png"]
    assert list(callback.unreadable) == [str(tmp_path / "b.png")]
    assert "b.png cannot be read and is skipped: " in caplog.text
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_text("no image")
    with pytest.raises(OSError, match=r"none of the 3 files can be read, for example .*a\.png: "):
        predict(tmp_path)


def test_images_of_formats_that_anomalib_does_not_take_are_named(tmp_path, caplog):
    image = np.zeros((8, 8, 3), np.uint8)
    for name in ("a.png", "b.gif", "sub/c.jp2"):
        write(tmp_path / name, image)
    (tmp_path / "notes.txt").write_text("no image")
    predict(tmp_path / "a.png")
    assert f"1 images are not predicted, as anomalib does not take their format: {tmp_path / 'b.gif'}" in caplog.text
    write(tmp_path / "d.png", image)
    caplog.clear()
    predict(tmp_path)
    assert f"2 images are not predicted, as anomalib does not take their format: {tmp_path / 'b.gif'}, " in caplog.text


@pytest.mark.parametrize(
    ("white_levels", "white"), [({"a": 4095.0, "b": 4095.0}, 4095), ({"a": 1.0, "b": 2.0}, 1023), (None, 1023)]
)
def test_images_of_high_bit_depth_are_read_again(white_levels, white, tmp_path):
    shades = np.linspace(0, 1000, 64).astype(np.uint16).reshape(8, 8)
    write(tmp_path / "a.png", shades)
    write(tmp_path / "b.png", np.full((16, 8), 51, np.uint8))
    callback, batch = predict(tmp_path, white_levels)
    assert callback.white_of() == white
    assert batch.image.shape == (2, 3, 16, 8)
    assert batch.image[0].mean() == pytest.approx(shades.mean() / white, abs=0.01)
    assert torch.allclose(batch.image[1], torch.tensor(0.2))


@pytest.mark.parametrize("run", ["test", "predict", "loader"])
def test_images_of_equal_names_have_a_picture_each(run, tmp_path):
    """The names of the categories are not in the paths of the images."""
    make_dataset(tmp_path / "data", ("bolts", "cloth"))
    modules = []
    for name in ("bolts", "cloth"):
        root = tmp_path / "data" / name
        shutil.move(root / "test" / "square", root / "other" / "good")
        modules.append(Folder(name=name, root=root, normal_dir="train/good", abnormal_dir="other/good",
                              normal_test_dir="test/good", val_split_mode="same_as_test"))  # fmt: skip
    datamodule = MultiCategory(modules, categories=["first", "second"], num_workers=0)
    datamodule.setup()
    trainer = make_trainer(CategoryVisualizer(), folder=tmp_path / "run")
    if run == "test":
        trainer.test(Model(), datamodule=datamodule, verbose=False)
    elif run == "predict":
        trainer.predict(Model(), datamodule=datamodule)
    else:
        trainer.predict(Model(), datamodule.test_dataloader())
    pictures = {path.relative_to(tmp_path / "run" / "images") for path in tmp_path.glob("run/images/**/*.png")}
    assert len(pictures) == 12
    assert {path.parts[0] for path in pictures} == {"first", "second"}
    assert Path("first/bolts/other/good/000.png") in pictures


def test_pictures_of_another_model_show_the_white_level_of_the_category(tmp_path):
    make_dataset(tmp_path / "data", ("bolts",))
    for path in tmp_path.glob("data/bolts/t*/*/*.png"):
        gray = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(path), gray.astype(np.uint16) * 16)
    datamodule = MultiCategory("MVTecAD", root=tmp_path / "data", num_workers=0)
    make_trainer(CategoryVisualizer(), folder=tmp_path).test(Model(), datamodule=datamodule, verbose=False)
    picture = cv2.imread(str(tmp_path / "images/bolts/test/good/000.png"))[40:, :200]
    original = cv2.imread(str(tmp_path / "data/bolts/test/good/000.png"), cv2.IMREAD_UNCHANGED)
    assert picture.mean() == pytest.approx(original.mean() / 16, abs=6)
