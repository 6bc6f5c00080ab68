import shutil
import sys
from pathlib import Path

import pytest
from anomalib.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks import EarlyStopping

from anomalib_decad import MultiCategory
from anomalib_decad.metrics import METRICS


def test_metrics_of_a_validation_are_those_of_a_test_without_files(make_engine, make_model, make_data, capsys):
    engine = make_engine()
    engine.fit(make_model(), datamodule=make_data())
    metrics = engine.trainer.callback_metrics
    assert set(METRICS) | {"mAD", "bolts/image_AUROC", "cloth/pixel_AUPRO"} <= set(metrics)
    assert not list(Path(engine.trainer.default_root_dir).rglob("metrics.*"))
    assert "Metrics in %" not in capsys.readouterr().out
    (results,) = engine.test(datamodule=make_data())
    # The validation images are the test images.
    for name in METRICS:
        assert float(metrics[name]) == pytest.approx(results[name], abs=1e-6)


def test_callbacks_that_monitor_a_metric(make_engine, make_model, make_data, tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="image_AUROC", mode="max")
    stop = EarlyStopping("cloth/image_AP", mode="max", patience=1, min_delta=2.0)
    engine = make_engine(best, stop, max_epochs=4)
    engine.fit(make_model(), datamodule=make_data())
    assert Path(best.best_model_path).is_file()
    assert engine.trainer.global_step == 6


class Closed:
    """An output that nobody reads any more."""

    def isatty(self):
        return False

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        pass


def test_names_are_printed_as_they_are(mvtec_root, make_engine, make_model, tmp_path, capsys):
    """Also what rich reads as markup."""
    root = tmp_path / "data [1]"
    for name in ("bolt[m6]", "bolt[m8]"):
        shutil.copytree(mvtec_root / "bolts", root / name)
    model, data = make_model(), MultiCategory("MVTecAD", root=root, num_workers=0)
    engine = make_engine()
    engine.fit(model, datamodule=data)
    engine.test(model, datamodule=data)
    output = capsys.readouterr().out
    for name in ("bolt[m6]", "bolt[m8]"):
        assert sum(line.split()[:1] == [name] for line in output.splitlines()) == 2
    (path,) = tmp_path.rglob("metrics.csv")
    assert "/data [1]/" in str(path)
    assert f"Written to {path} and metrics.json" in output


def test_an_output_that_is_closed_takes_no_results_with_it(make_engine, make_model, make_data, tmp_path, monkeypatch):
    model, data, engine = make_model(report=False), make_data(), make_engine()
    engine.fit(model, datamodule=data)
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BaseException):  # noqa: B017, PT011 (rich ends the program)
        engine.test(model, datamodule=data)
    (path,) = tmp_path.rglob("metrics.json")
    assert "mAD" in path.read_text()
    assert path.with_suffix(".csv").is_file()
