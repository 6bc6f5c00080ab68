from pathlib import Path

import pytest
from anomalib.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks import EarlyStopping

from anomalib_decad.metrics import METRICS


def test_metrics_of_a_validation_are_those_of_a_test_without_files(make_engine, make_model, make_data, capsys):
    engine = make_engine()
    engine.fit(make_model(), datamodule=make_data())
    metrics = engine.trainer.callback_metrics
    assert set(METRICS) | {"mean_of_seven", "bolts/image_AUROC", "cloth/pixel_AUPRO"} <= set(metrics)
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
