"""Masks are found by the names of their images."""

import shutil

import cv2
import numpy as np
import pytest
from anomalib.data.errors import MisMatchError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anomalib_decad import MultiCategory
from anomalib_decad.data.layouts import pair_by_name
from conftest import make_dataset

STEMS = st.text("a1-_.m", min_size=1, max_size=4)
FOLDER = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/square",
          "mask_dir": "ground_truth/square"}  # fmt: skip


def write_defects(folder, names, mask_name="{}_mask.png"):
    """A product whose masks have as many pixels as their images have of brightness."""
    for split in ("train", "test"):
        write(folder / split / "good" / "0.png", np.full((32, 32), 50))
    for number, name in enumerate(names, 1):
        write(folder / "test" / "square" / f"{name}.png", np.full((32, 32), number))
        mask = np.zeros((32, 32))
        mask.flat[:number] = 255
        write(folder / "ground_truth" / "square" / mask_name.format(name), mask)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image.astype(np.uint8))


def multi(layout, root, **folders):
    """A datamodule of products; of those in folders, some may be called otherwise."""
    options = {"datamodule_args": {**FOLDER, **folders}, "val_split_mode": "same_as_test"} if layout == "Folder" else {}
    return MultiCategory(layout, root=root, num_workers=0, **options)


def pairs_of(datamodule):
    datamodule.setup()
    items = [datamodule.test_data[index] for index in range(len(datamodule.test_data))]
    return [(round(float(item.image.mean()) * 255), int(item.gt_mask.sum())) for item in items if item.gt_label]


@given(stems=st.sets(STEMS, min_size=1, max_size=6), before=st.sampled_from(["", "mask-", "m"]),
       after=st.sampled_from(["", "_mask", "_gt", "1"]))  # fmt: skip
def test_masks_of_one_naming_are_found(stems, before, after):
    masks = {("hole", f"{before}{stem}{after}"): stem for stem in stems}
    images = [("hole", stem) for stem in sorted(stems)]
    assert pair_by_name(images, masks) == sorted(stems)


def test_a_mask_is_in_the_folder_of_its_image_unless_its_name_is_the_only_one():
    images = [("hole", "1"), ("dent", "1"), ("dent", "2")]
    masks = {("hole", "1"): "a", ("all", "2"): "b", ("all", "1"): "c"}
    assert pair_by_name(images, masks) == ["a", None, None]
    assert pair_by_name(images, masks, anywhere=True) == ["a", None, "b"]


@pytest.mark.parametrize("mask_name", ["{}_mask.png", "{}.png", "{}.bmp", "{}_gt.png"])
@pytest.mark.parametrize("layout", ["MVTecAD", "MPDD", "Folder"])
def test_masks_are_not_paired_by_sort_order(layout, mask_name, tmp_path):
    write_defects(tmp_path / "gear", ["anomaly-1", "anomaly-10", "anomaly-2", "anomaly"], mask_name)
    assert sorted(pairs_of(multi(layout, tmp_path))) == [(1, 1), (2, 2), (3, 3), (4, 4)]


@pytest.mark.parametrize("mask_dir", ["ground_truth", ["ground_truth/hole", "ground_truth/dent"]])
def test_folders_of_several_defects(mask_dir, tmp_path):
    write_defects(tmp_path / "gear", ["1", "2"])
    for name in ("hole", "dent"):
        for part in ("test", "ground_truth"):
            shutil.copytree(tmp_path / "gear" / part / "square", tmp_path / "gear" / part / name)
    write(tmp_path / "gear" / "ground_truth" / "dent" / "2_mask.png", np.full((32, 32), 255))
    datamodule = multi("Folder", tmp_path, abnormal_dir=["test/hole", "test/dent"], mask_dir=mask_dir)
    assert sorted(pairs_of(datamodule)) == [(1, 1), (1, 1), (2, 2), (2, 1024)]


def test_of_folders_in_one_another_the_innermost_has_an_image(tmp_path):
    root = tmp_path / "gear"
    write_defects(root, ["1", "2", "3"], "{}.png")
    shutil.move(root / "test" / "good", root / "train" / "good" / "test")
    shutil.move(root / "ground_truth" / "square", root / "test" / "square" / "masks")
    datamodule = multi("Folder", tmp_path, normal_test_dir="train/good/test", mask_dir="test/square/masks")
    assert sorted(pairs_of(datamodule)) == [(1, 1), (2, 2), (3, 3)]
    assert (len(datamodule.train_data), len(datamodule.test_data)) == (1, 4)


@pytest.mark.parametrize("layout", ["MVTecAD", "Folder"])
def test_an_image_without_its_mask_is_named(layout, tmp_path):
    write_defects(tmp_path / "gear", ["1", "10"])
    (tmp_path / "gear" / "ground_truth" / "square" / "1_mask.png").unlink()
    message = r"the category 'gear' cannot be read: 1 of 2 anomalous images have no mask, the first is .*/1\.png: its"
    with pytest.raises(MisMatchError, match=message):
        multi(layout, tmp_path).setup()


@pytest.mark.parametrize("name", ["abnormal_dir", "mask_dir"])
def test_a_folder_that_no_product_has_is_mistyped(name, tmp_path):
    write_defects(tmp_path / "gear", ["1"])
    write_defects(tmp_path / "nut", ["1"])
    shutil.rmtree(tmp_path / "nut" / FOLDER[name])
    multi("Folder", tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name}: there is no folder .*/gear/wrong, nor in any other product"):
        multi("Folder", tmp_path, **{name: "wrong"})


def test_several_masks_of_an_image_are_joined_or_refused(tmp_path):
    write_defects(tmp_path / "gear", ["1"], "{}_mask.png")
    other = np.zeros((32, 32))
    other.flat[-3:] = 255
    write(tmp_path / "gear" / "ground_truth" / "square" / "1_mask.bmp", other)
    assert pairs_of(multi("MVTecAD", tmp_path)) == [(1, 4)]
    write(tmp_path / "gear" / "ground_truth" / "square" / "1_mask.bmp", np.zeros((16, 32)))
    with pytest.raises(MisMatchError, match=r"1_mask\.bmp, .*1_mask\.png are of one image, and have different sizes"):
        multi("MVTecAD", tmp_path).setup()


@pytest.mark.parametrize("layout", ["MVTecAD", "Folder"])
def test_a_product_without_masks_is_scored_by_images(layout, tmp_path, caplog):
    make_dataset(tmp_path, ("gear",), num_train=2, num_test=2)
    shutil.rmtree(tmp_path / "gear" / "ground_truth")
    datamodule = multi(layout, tmp_path, mask_dir=None)
    datamodule.setup()
    batch = next(iter(datamodule.test_dataloader()))
    assert batch.gt_mask is None
    assert batch.gt_label.sum() == 2
    assert "The category gear: no masks, so there are no pixel metrics" in caplog.text


@pytest.mark.parametrize("layout", ["MVTecAD", "Folder"])
def test_images_of_other_formats_and_masks_without_an_image_are_named(layout, tmp_path, caplog):
    write_defects(tmp_path / "gear", ["1", "10"])
    (tmp_path / "gear" / "test" / "square" / "1.png").unlink()
    for name in ("train/good/a.gif", "test/square/b.jp2", "notes.gif"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "gear" / name)
    assert len(pairs_of(multi(layout, tmp_path))) == 1
    for name in ("train/good/a.gif", "test/square/b.jp2"):
        assert f"the first is {tmp_path / 'gear' / name}" in caplog.text
    assert caplog.text.count("1 images are not used, as their format is none of .jpg .jpeg") == 2
    assert "1 masks have no image, the first is" in caplog.text
