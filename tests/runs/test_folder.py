import json
import shutil
from pathlib import Path

import pytest

from conftest import ENCODER, IMAGE_SIZE, anomalib


def test_tests_and_predictions_have_folders_of_their_own(make_engine, make_model, make_data, tmp_path, capsys):
    model, engine = make_model(visualizer=True), make_engine()
    engine.train(model, datamodule=make_data())
    root = tmp_path / "DecAD" / "factory"
    trained = (root / "v0" / "metrics.csv").stat().st_mtime_ns
    for number in range(2):
        make_engine().test(model, datamodule=make_data())
        assert (root / "tests" / f"v{number}" / "metrics.csv").is_file()
        assert capsys.readouterr().out.splitlines()[-1].endswith(str(Path("tests") / f"v{number}"))
        make_engine().predict(model, datamodule=make_data())
        assert len(list((root / "predictions" / f"v{number}" / "images").rglob("*.png"))) == 12
        assert capsys.readouterr().out.splitlines()[-1].startswith("Predicted 12 images, ")
    assert (root / "v0" / "metrics.csv").stat().st_mtime_ns == trained
    assert (root / "latest").resolve() == root / "v0"


def test_the_trainer_of_a_training_tests_in_its_folder(make_engine, make_model, make_data, tmp_path, capsys):
    model, engine = make_model(visualizer=True), make_engine()
    engine.fit(model, datamodule=make_data())
    assert capsys.readouterr().out.splitlines()[-1] == f"The trained model is in {engine.best_model_path}"
    engine.predict(model, datamodule=make_data())
    engine.test(model, datamodule=make_data())
    root = tmp_path / "DecAD" / "factory"
    assert (root / "v0" / "metrics.csv").is_file()
    assert not (root / "tests").exists()
    assert len(list((root / "v0" / "images").rglob("*.png"))) == 12
    assert len(list((root / "predictions" / "v0" / "images").rglob("*.png"))) == 12


def test_a_training_after_a_prediction(make_engine, make_model, make_data, tmp_path):
    model = make_model()
    make_engine().test(model, datamodule=make_data())
    make_engine(max_steps=1).fit(model, datamodule=make_data())
    assert (tmp_path / "DecAD" / "factory" / "latest").resolve().name == "v0"


@pytest.mark.slow
def test_folders_on_the_command_line(tmp_path, encoder_weights, data_args, mvtec_root):
    model = [
        "--model", "DecAD", "--model.encoder", ENCODER, "--model.encoder_weights", encoder_weights, "--model.layers",
        "[1,2]", "--model.image_size", f"[{IMAGE_SIZE},{IMAGE_SIZE}]", "--trainer.accelerator", "cpu",
        "--default_root_dir", tmp_path / "results",
    ]  # fmt: skip
    # Two processes, whose second one used to have a folder of its own, which latest named.
    anomalib("train", *model, *data_args, "--trainer.max_steps", 2, "--trainer.devices", 2, "--trainer.strategy", "ddp")
    root = tmp_path / "results" / "DecAD" / "factory"
    run = root / "v0"
    assert sorted(path.name for path in root.iterdir()) == ["latest", "v0"]
    assert (root / "latest").resolve() == run
    assert (run / "metrics.csv").is_file()
    assert len(list((run / "images").rglob("*.png"))) == 12
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    checkpoint = ["--ckpt_path", run / "weights" / "lightning" / "model.ckpt"]
    result = anomalib("test", *model, *data_args, *checkpoint)
    assert result.stdout.splitlines()[-1] == f"The results of the test are in {root / 'tests' / 'v0'}"
    assert json.loads((root / "tests" / "v0" / "metrics.json").read_text())

    photos = tmp_path / "photos"
    for name in ("a", "b"):
        shutil.copytree(mvtec_root / "bolts" / "test" / "square", photos / name / "today")
    (photos / "a" / "today" / "000.png").write_bytes((photos / "b" / "today" / "000.png").read_bytes()[:3000])
    (photos / "b" / "notes.png").write_text("no image")
    for number in range(2):
        result = anomalib("predict", *model, *checkpoint, "--data", photos)
        folder = tmp_path / "results" / "DecAD" / "predictions" / f"v{number}" / "images"
        *_, skipped, last = result.stdout.splitlines()
        assert skipped.startswith("Skipped 2 files that cannot be read: ")
        assert str(photos / "a" / "today" / "000.png") in skipped
        assert last.startswith("Predicted 5 images, ")
        assert " of them anomalous" in last
        assert last.endswith(
            f"; a line for each is in {folder.parent / 'predictions.csv'}; the pictures are in {folder}"
        )
        assert len(list(folder.rglob("*.png"))) == 5
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    shutil.rmtree(photos / "a")
    shutil.rmtree(photos / "b" / "today")
    result = anomalib("predict", *model, *checkpoint, "--data", photos, check=False)
    assert result.returncode != 0
    assert "none of the 1 files can be read" in " ".join((result.stderr + result.stdout).split())
