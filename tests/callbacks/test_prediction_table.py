"""A line for each image, with what it is, what was decided and where."""

import csv
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tifffile
import torch
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from anomalib.models import Padim
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from anomalib_decad.callbacks import AnomalyMapWriter, PredictionTable
from anomalib_decad.callbacks.prediction_table import COLUMNS, _find_defect
from anomalib_decad.metrics import CategoryEvaluator
from anomalib_decad.thresholds import CategoryPostProcessor


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_lines_say_what_the_batches_do(make_engine, make_model, make_data, tmp_path):
    model, data, engine = make_model(save_maps="float16"), make_data(), make_engine()
    engine.fit(model, datamodule=data)
    engine.test(model, datamodule=data)
    folder = next(tmp_path.rglob("predictions.csv")).parent
    lines = {line["path"]: line for line in read(folder / "predictions.csv")}
    assert len(lines) == len(data.test_data)
    for index in range(len(data.test_data)):
        item = data.test_data[index]
        line = lines[item.image_path]
        assert line["product"] == item.category
        assert tuple(line) == COLUMNS
        assert 0 <= float(line["score"]) <= 1
        assert (line["label"] == "anomalous") == (float(line["score"]) > 0.5)
        limits = model.post_processor.limits(item.category)
        expected = (float(line["raw_score"]) - limits.image_threshold) / (limits.image_max - limits.image_min) + 0.5
        assert float(line["score"]) == pytest.approx(np.clip(expected, 0, 1), abs=1e-4)
        parts = item.image_path.split("/")[-4:]
        values = tifffile.imread(folder / "anomaly_maps" / "/".join(parts).replace(".png", ".tiff"))
        assert values.dtype == np.float16
        assert values.shape == cv2.imread(item.image_path).shape[:2]
        assert values.max() == pytest.approx(float(line["raw_score"]), rel=0.5)
    assert not list(folder.rglob("*.partial"))


def test_a_folder_says_which_product_it_shows(make_engine, make_model, make_data, mvtec_root, tmp_path):
    model, data = make_model(), make_data()
    make_engine().fit(model, datamodule=data)
    engine = Engine(default_root_dir=tmp_path / "predicted", accelerator="cpu", logger=False)
    engine.predict(model, data_path=mvtec_root / "cloth" / "train" / "good")
    lines = read(next((tmp_path / "predicted").rglob("predictions.csv")))
    assert [line["product"] for line in lines] == ["cloth"] * 6


def test_without_thresholds_nothing_is_decided(make_engine, make_model, make_data, tmp_path):
    model, data = make_model(), make_data()
    engine = make_engine(limit_val_batches=0)
    engine.fit(model, datamodule=data)
    engine.test(model, datamodule=data)
    lines = read(next(tmp_path.rglob("predictions.csv")))
    assert len(lines) == len(data.test_data)
    for line in lines:
        assert float(line["score"]) == float(line["raw_score"])
        assert {line[name] for name in ("label", "defect_x", "defect_width", "defect_share")} == {""}


def test_other_models_have_it_too(make_data, tmp_path):
    table = PredictionTable()
    model = Padim(
        "resnet18", ["layer1"], pre_trained=False, n_features=20, evaluator=CategoryEvaluator(), visualizer=False,
        post_processor=CategoryPostProcessor(),
    )  # fmt: skip
    engine = Engine(
        default_root_dir=tmp_path, accelerator="cpu", callbacks=[table, AnomalyMapWriter("float32")], logger=False
    )
    data = make_data()
    engine.fit(model, datamodule=data)
    engine.test(model, datamodule=data)
    path = next(tmp_path.rglob("predictions.csv"))
    lines = read(path)
    assert len(lines) == len(data.test_data)
    assert {line["product"] for line in lines} == {"bolts", "cloth"}
    assert {line["label"] for line in lines} <= {"normal", "anomalous"}
    assert model.post_processor.categories == ["bolts", "cloth"]
    for line in lines:
        limits = model.post_processor.limits(line["product"])
        assert (float(line["raw_score"]) > limits.image_threshold) == (line["label"] == "anomalous")
    # Padim's maps, whose largest value is its score, as they were before they were normalized.
    by_path = {line["path"]: float(line["raw_score"]) for line in lines}
    assert max(by_path.values()) > 1
    for file in path.parent.rglob("*.tiff"):
        (raw,) = [
            score for name, score in by_path.items() if name.endswith(str(file.with_suffix(".png")).split("maps/")[1])
        ]
        assert tifffile.imread(file).max() <= raw * (1 + 1e-5)


def test_the_box_is_that_of_the_largest_defect_in_the_file(tmp_path):
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), np.zeros((200, 400), np.uint8))
    mask = torch.zeros(1, 20, 20)
    mask[0, 5:15, 2:6] = 1  # 10 x 4 pixels
    mask[0, 18, 18] = 1
    left, top, width, height, share = _find_defect(mask, str(path))
    assert (left, top, width, height) == (40, 50, 80, 100)
    assert share == pytest.approx(41 / 400)
    # Of a file that is gone, in pixels of the map.
    assert _find_defect(mask, str(tmp_path / "gone.png"))[:4] == [2, 5, 4, 10]
    assert _find_defect(torch.zeros(4, 4), str(path)) == [None, None, None, None, 0.0]
    assert _find_defect(None, str(path)) == [None] * 5


@pytest.mark.parametrize("step", [CenterCrop(16), Resize(16)])
def test_a_model_that_crops_knows_no_place_in_the_file(step, tmp_path):
    """Where a defect is, is not said, and no maps are written that would not fit."""
    trainer = make_trainer(tmp_path)
    limits = SimpleNamespace(image_threshold=torch.tensor(0.5), pixel_threshold=torch.tensor(0.5))
    module = SimpleNamespace(
        pre_processor=SimpleNamespace(transform=Compose([step, Normalize([0.5], [0.5])])), post_processor=limits
    )
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), np.zeros((32, 32), np.uint8))
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, 4:8, 4:8] = True
    batch = ImageBatch(
        image=torch.zeros(1, 3, 16, 16), pred_mask=mask, pred_label=torch.tensor([True]), image_path=[str(path)]
    )
    table = PredictionTable()
    table.on_test_start(trainer, module)
    table.read_batch(trainer, module, batch, 1)
    table.on_test_end(trainer, module)
    (line,) = read(tmp_path / "predictions.csv")
    assert line["label"] == "anomalous"
    place = [line[name] for name in COLUMNS[5:]]
    if isinstance(step, CenterCrop):
        assert place == [""] * 5
        with pytest.raises(ValueError, match="save_maps: the model's pre_processor crops images"):
            AnomalyMapWriter("float32").setup(trainer, module, "test")
    else:
        assert place == ["8", "8", "8", "8", "0.0625"]
        AnomalyMapWriter("float32").setup(trainer, module, "test")


def record(table, trainer, path, score=0.5):
    """Start a table, and have it take the prediction of one image."""
    table.on_predict_start(trainer, None)
    batch = ImageBatch(image=torch.zeros(1, 3, 4, 4), pred_score=torch.tensor([score]), image_path=[path])
    table.on_predict_batch_end(trainer, None, batch, batch, 0)
    table.on_predict_epoch_end(trainer, None)


def make_trainer(folder, is_global_zero=True):
    return SimpleNamespace(default_root_dir=folder, is_global_zero=is_global_zero, predicting=True, world_size=1)


def test_a_score_that_is_no_number_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"the score of 0\.png is nan: the weights of the model are damaged"):
        record(PredictionTable(), make_trainer(tmp_path), "0.png", float("nan"))


def test_names_are_kept_and_rows_of_processes_joined(tmp_path, monkeypatch, caplog):
    """Also names that are no text. A run that failed has left nothing."""
    names = ['a "b", c.png', "\udc80.png"]
    tables = [PredictionTable() for _ in names]
    for table, name in zip(tables, names, strict=True):
        record(table, make_trainer(tmp_path), "failed.png")
        table.on_exception(None, None, RuntimeError())
        record(table, make_trainer(tmp_path), name)
    rows = [table._rows for table in tables]
    monkeypatch.setattr("anomalib_decad.callbacks.prediction_table.gather", lambda _: rows)
    with caplog.at_level("INFO"):
        for table, is_global_zero in zip(tables, (False, True), strict=True):
            table.on_predict_end(make_trainer(tmp_path, is_global_zero), None)
    (path,) = tmp_path.iterdir()
    lines = path.read_text("utf-8", "surrogateescape").splitlines()
    assert lines[1:] == ['"a ""b"", c.png",,0.5,0.5,,,,,,', "\udc80.png,,0.5,0.5,,,,,,"]
    assert caplog.text.count(f"Predicted 2 images (0 anomalous): {path}") == 1


def test_maps_of_equally_named_images_stay_apart(tmp_path):
    paths = []
    for name in ("bottle/test/good/0.png", "brush/test/good/0.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros((8, 8, 3), np.uint8))
        paths.append(str(path))
    batch = ImageBatch(image=torch.zeros(2, 3, 8, 8), anomaly_map=torch.rand(2, 8, 8), image_path=paths)
    AnomalyMapWriter("float32").read_batch(make_trainer(tmp_path), None, batch, 2)
    files = sorted(path.relative_to(tmp_path / "anomaly_maps").as_posix() for path in tmp_path.rglob("*.tiff"))
    assert files == ["bottle/test/good/0.tiff", "brush/test/good/0.tiff"]


def test_without_recognition_nothing_is_called_unknown(tmp_path):
    trainer, post_processor = make_trainer(tmp_path), CategoryPostProcessor()
    module = SimpleNamespace(post_processor=post_processor)
    table = PredictionTable()
    table.on_predict_start(trainer, None)
    batch = ImageBatch(image=torch.zeros(1, 3, 4, 4), pred_score=torch.tensor([0.5]), image_path=["0.png"])
    table.read_batch(trainer, module, batch, 1)
    post_processor.follow(["bolt"])
    table.read_batch(trainer, module, batch, 1)
    batch.category_index = torch.tensor([-1])
    table.read_batch(trainer, module, batch, 1)
    table.on_predict_end(trainer, None)
    assert [line["product"] for line in read(tmp_path / "predictions.csv")] == ["", "", "unknown"]
