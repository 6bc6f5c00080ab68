"""A folder to predict, of which images are read again, and pictures."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import Folder, PredictDataset
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from anomalib_decad import MultiCategory
from anomalib_decad.data import CategoryVisualizer, PredictionFolder, place_of
from conftest import make_dataset


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


@pytest.mark.parametrize(
    ("white_levels", "white"), [({"a": 4095.0, "b": 4095.0}, 4095), ({"a": 1.0, "b": 2.0}, 1023), (None, 1023)]
)
def test_images_of_high_bit_depth_are_read_again(white_levels, white, tmp_path):
    shades = np.linspace(0, 1000, 64).astype(np.uint16).reshape(8, 8)
    write(tmp_path / "a.png", shades)
    write(tmp_path / "b.png", np.full((16, 8), 51, np.uint8))
    callback, batch = predict(tmp_path, white_levels)
    assert callback.white_of(None) == white
    assert batch.image.shape == (2, 3, 16, 8)
    assert batch.image[0].mean() == pytest.approx(shades.mean() / white, abs=0.01)
    assert torch.allclose(batch.image[1], torch.tensor(0.2))


def test_a_place_has_no_way_out():
    assert place_of("photos/../../x/y/../z/0.png", "bolts").parts[-2:] == ("z", "0.png")
    assert ".." not in place_of("../0.png").parts
    assert place_of("/0.png") == Path("0.png")


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
    assert Path("first/other/good/000.png") in pictures


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


def test_images_of_formats_that_anomalib_does_not_take_are_named(tmp_path, caplog):
    for name in ("a.png", "b.gif", "c.png"):
        write(tmp_path / name, np.zeros((8, 8, 3), np.uint8))
    predict(tmp_path / "a.png")
    assert "not predicted" not in caplog.text
    predict(tmp_path)
    assert f"{tmp_path}: 1 images are not predicted, as anomalib does not take their format, the first is b.gif" in (
        caplog.text
    )
