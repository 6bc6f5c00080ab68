"""Training without test images, validation images, or one kind of them."""

import shutil

import pytest

from anomalib_decad import MultiCategory
from conftest import make_dataset

FOLDER = {"datamodule": "Folder", "datamodule_args": {"normal_dir": "train/good"}}
NONE = {"test_split_mode": "none", "val_split_mode": "none"}


@pytest.mark.parametrize(
    ("arguments", "findings"),
    [
        (NONE, ["no normal test images, so there are no image metrics", "no validation images"]),
        ({**FOLDER, **NONE}, ["no test images, so there are no metrics", "no validation images"]),
        (FOLDER, ["no anomalous test images, so there are no metrics", "of its training images are held out"]),
        ({"val_split_mode": "none"}, ["no validation images, so it has no part in the thresholds"]),
    ],
)
def test_a_training_goes_on_and_what_is_missing_is_said(arguments, findings, tmp_path, make_model, make_engine, caplog):
    make_dataset(tmp_path / "data", ("bolts", "cloth"), num_train=8)
    datamodule = MultiCategory(
        **{"datamodule": "MVTecAD", **arguments}, root=tmp_path / "data", num_workers=0, train_batch_size=4, seed=0
    )
    engine = make_engine(val_check_interval=2, check_val_every_n_epoch=None)
    engine.train(make_model(), datamodule=datamodule)
    for category in ("bolts", "cloth"):
        (line,) = [text for text in caplog.messages if f"category {category}:" in text]
        for finding in findings:
            assert finding in line


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 10])
@pytest.mark.parametrize("arguments", [{}, {"test_split_mode": "none"}, {"val_split_mode": "same_as_test"}])
def test_few_normal_images_are_enough(count, arguments, tmp_path):
    make_dataset(tmp_path, ("bolts",), num_train=count, num_test=0)
    datamodule = MultiCategory(**FOLDER, root=tmp_path, num_workers=0, seed=0, **arguments)
    datamodule.setup()
    assert len(datamodule.train_data) >= max(1, 0.8 * count - 1)
    if not arguments and count > 1:
        assert len(datamodule.val_data)


@pytest.mark.parametrize("count", [2, 8, 40])
def test_training_images_stand_in_for_validation_images(count, tmp_path, caplog):
    make_dataset(tmp_path, ("bolts",), num_train=count, num_test=0)
    datamodule = MultiCategory(**FOLDER, root=tmp_path, num_workers=0, test_split_mode="none", seed=0)
    datamodule.setup()
    train, val = (set(data.samples.image_path) for data in (datamodule.train_data, datamodule.val_data))
    assert len(val) == {2: 1, 8: 2, 40: 6}[count]
    assert not train & val
    assert len(train | val) == count
    assert f"{len(val)} of its training images are held out for the thresholds" in caplog.text
    item = datamodule.val_data[0]
    assert not item.gt_label
    assert item.category == "bolts"
    wants_none = MultiCategory(**FOLDER, **NONE, root=tmp_path, num_workers=0)
    wants_none.setup()
    assert len(wants_none.train_data) == count
    assert not hasattr(wants_none, "val_data") or not len(wants_none.val_data)


@pytest.mark.parametrize(("layout", "missing"), [("MVTecAD", "test"), ("Folder", "test/square")])
def test_one_product_without_defects_joins_others_that_have_some(layout, missing, tmp_path, caplog):
    make_dataset(tmp_path, ("bolts", "cloth"))
    shutil.rmtree(tmp_path / "bolts" / missing)
    shutil.rmtree(tmp_path / "bolts" / "ground_truth")
    folders = {"normal_dir": "train/good", "abnormal_dir": "test/square", "normal_test_dir": "test/good",
               "mask_dir": "ground_truth/square"}  # fmt: skip
    options = {"datamodule_args": folders, "val_split_mode": "same_as_test"} if layout == "Folder" else {}
    datamodule = MultiCategory(layout, root=tmp_path, num_workers=0, seed=0, **options)
    datamodule.setup()
    labels = datamodule.test_data.samples.groupby("category").label_index.sum()
    assert labels.to_dict() == {"bolts": 0, "cloth": 3}
    assert next(iter(datamodule.test_dataloader())).gt_mask.flatten(1).any(1).sum() == 3
    assert "The category bolts: no anomalous test images" in caplog.text


def test_real_iad_keeps_its_normal_test_images(tmp_path):
    (datamodule,) = MultiCategory("RealIAD", ["audiojack"], tmp_path).datamodules.values()
    assert datamodule.test_split_mode == "from_dir"
    (datamodule,) = MultiCategory("RealIAD", ["audiojack"], tmp_path, test_split_mode="none").datamodules.values()
    assert datamodule.test_split_mode == "none"
