"""Every layout that the documents promise: two categories of a small copy of each."""

import importlib.util

import pytest
from layouts import BAD, GOOD, TRAIN, autovi, btech, kaputt, loco, mvtec, mvtec_2, real_iad, visa, visa_prepared

from anomalib_decad import MultiCategory
from anomalib_decad.models.decad import AnomalyMapOptions

OPTIONS = {"num_workers": 0, "train_batch_size": 20, "eval_batch_size": 20}
FOLDER = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/hole",
          "mask_dir": "ground_truth/hole"}  # fmt: skip
#: Datamodule, what writes its layout, names, arguments, and how many validation images a category has.
LAYOUTS = {
    "MVTecAD": ("MVTecAD", mvtec, ("bottle", "gear"), {}, GOOD + BAD),
    "MVTecAD2": ("MVTecAD2", mvtec_2, ("can", "vial"), {}, GOOD),
    "MVTecLOCO": ("MVTecLOCO", loco, ("juice_bottle", "pushpins"), {}, GOOD),
    "Visa": ("Visa", visa, ("candle", "pcb1"), {}, GOOD + BAD),
    "Visa-prepared": ("Visa", visa_prepared, ("candle", "dummy"), {}, GOOD + BAD),
    "RealIAD": ("RealIAD", real_iad, ("audiojack", "zipper"), {}, GOOD + BAD),
    "BTech": ("BTech", btech, ("01", "03"), {}, GOOD + BAD),
    "MPDD": ("MPDD", mvtec, ("bracket_black", "tubes"), {}, GOOD + BAD),
    "AutoVI": ("AutoVI", autovi, ("engine_wiring", "tank_screw"), {}, GOOD + BAD),
    "Folder": ("Folder", mvtec, ("gear", "nut"),
               {"datamodule_args": FOLDER, "val_split_mode": "same_as_test"}, GOOD + BAD),
    "Kaputt": pytest.param(
        ("Kaputt", kaputt, ("other", "paper"), {}, GOOD + 1),
        marks=pytest.mark.skipif(not importlib.util.find_spec("pyarrow"), reason="anomalib reads Kaputt with pyarrow"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_images_labels_and_masks(layout, tmp_path, caplog):
    name, write, categories, arguments, num_val = layout
    write(tmp_path, categories)
    datamodule = MultiCategory(name, root=tmp_path, **arguments, **OPTIONS)
    assert datamodule.categories == list(categories)
    datamodule.prepare_data()
    datamodule.setup()
    for subset, normal, anomalous in (("train", TRAIN, 0), ("test", GOOD, BAD)):
        labels = getattr(datamodule, f"{subset}_data").samples.groupby("category").label_index
        assert labels.count().to_dict() == dict.fromkeys(categories, normal + anomalous)
        assert labels.sum().to_dict() == dict.fromkeys(categories, anomalous)
    assert len(datamodule.val_data) == 2 * num_val
    assert next(iter(datamodule.train_dataloader())).gt_label.sum() == 0
    batch = next(iter(datamodule.test_dataloader()))
    assert len(batch.image) == 2 * (GOOD + BAD)
    assert sorted(batch.category) == sorted(categories * (GOOD + BAD))
    has_defect = batch.gt_mask.flatten(1).any(1)
    assert has_defect.tolist() == batch.gt_label.tolist()
    expected = {80, 160} if name == "MVTecLOCO" else {80}
    assert set(batch.gt_mask.flatten(1).sum(1)[has_defect].tolist()) == expected
    next(iter(datamodule.val_dataloader()))
    lines = [text for text in caplog.messages if "The category" in text]
    assert not lines, lines


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_defects_are_found_where_the_masks_are_and_drawn_for_each_category(layout, tmp_path, make_model, make_engine):
    name, write, categories, arguments, _ = layout
    write(tmp_path / "data", categories)
    datamodule = MultiCategory(name, root=tmp_path / "data", **arguments, **OPTIONS)
    model = make_model(image_size=(96, 128), anomaly_map=AnomalyMapOptions(blur_sigma=2.0), visualizer=True)
    (results,) = make_engine(max_steps=2, limit_val_batches=0).train(model, datamodule=datamodule)
    (folder,) = tmp_path.glob("DecAD/**/images")
    assert {entry.name for entry in folder.iterdir()} == set(categories)
    for category in categories:
        assert results[f"{category}/pixel_AUROC"] > 0.9
        assert results[f"{category}/image_AUROC"] == 1
        assert len(list((folder / category).rglob("*.*"))) == GOOD + BAD


@pytest.mark.parametrize(("test_type", "count"), [("private", 3), ("private_mixed", 5)])
def test_private_images_of_mvtec_ad_2(test_type, count, tmp_path):
    mvtec_2(tmp_path, ("can", "vial"))
    datamodule = MultiCategory("MVTecAD2", root=tmp_path, datamodule_args={"test_type": test_type}, **OPTIONS)
    datamodule.setup()
    batch = next(iter(datamodule.test_dataloader()))
    assert len(batch.image) == 2 * count
    assert batch.gt_label is None
    assert batch.gt_mask is None


@pytest.mark.parametrize("numbers", [[1, 3], [3], ["01", 3]])
def test_numbers_are_names(numbers, tmp_path):
    btech(tmp_path, ("01", "03"))
    assert MultiCategory("BTech", numbers, tmp_path).categories == [f"{int(number):02}" for number in numbers]
    with pytest.raises(ValueError, match="no category '2'; valid names are 01, 03"):
        MultiCategory("BTech", [2], tmp_path)


def test_a_missing_mask_of_another_layout_is_named(tmp_path):
    real_iad(tmp_path, ("audiojack",))
    next(tmp_path.glob("realiad_256/*/NG/**/*.png")).unlink()
    with pytest.raises(Exception, match="'audiojack' cannot be read: 1 of 2 anomalous images have no mask, the first"):
        MultiCategory("RealIAD", root=tmp_path, **OPTIONS).setup()
