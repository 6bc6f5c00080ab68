import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from anomalib.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks import EarlyStopping

from anomalib_decad.metrics import DECISIONS, METRICS, CategoryEvaluator


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


def make_evaluator(*names):
    evaluator = CategoryEvaluator()
    evaluator.results = {name: dict.fromkeys((*METRICS, "mAD"), 1.0) for name in (*names, "mean")}
    evaluator.decisions = {name: dict.fromkeys(DECISIONS, 1.0) for name in (*names, "mean")}
    return evaluator


def test_nothing_is_cut_or_changed(tmp_path, capsys):
    names = "bolt[m6]", "50 % \N{GREEK SMALL LETTER MU}m", "a_product_with_a_name_of_" + "many_" * 20 + "signs"
    evaluator = make_evaluator(*names)
    evaluator.results[names[0]]["pixel_AP"] = float("nan")
    evaluator._write(tmp_path)
    output = capsys.readouterr().out
    assert output.count("100.0") == 13 * 4 - 1
    for name in names:
        assert sum(line.startswith(name) for line in output.splitlines()) == 2
    assert f"Written to {tmp_path / 'metrics.csv'} and metrics.json" in output
    content = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert list(content["categories"]) == [*names]
    assert content["categories"][names[0]]["pixel_AP"] is None


def test_an_output_that_is_closed_takes_no_results_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.print", Mock(side_effect=BrokenPipeError))
    with pytest.raises(BrokenPipeError):
        make_evaluator("bolts")._write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.json"]


def test_no_line_is_begun_and_ended_later(tmp_path, monkeypatch):
    """What stands for the output in a notebook never ends with one."""
    output = Mock()
    monkeypatch.setattr("sys.stdout", output)
    make_evaluator("bolts")._write(tmp_path)
    written = [call.args[0] for call in output.write.call_args_list if call.args[0]]
    assert len(written) == 3
    assert all(text.endswith("\n") for text in written)
