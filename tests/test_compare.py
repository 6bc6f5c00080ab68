"""The race of DecAD and its peers, on the tiny encoder."""

import csv
import json

import pytest
import torch

from conftest import ENCODER, run_benchmark


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_race_writes_a_table_and_a_plot_and_is_not_run_twice(encoder_weights, mvtec_root, tmp_path):
    arguments = {"DecAD": {"encoder_weights": str(encoder_weights), "layers": [1, 2]}}
    command = [
        "--data", mvtec_root, "--models", "DecAD", "--encoder", ENCODER, "--image-size", 64, "--steps", 2, 3,
        "--minutes", 0.02, "--batch-size", 4, "--arguments", json.dumps(arguments), "--output", tmp_path,
    ]  # fmt: skip
    result = run_benchmark("compare", *command)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout
    assert "failed" not in result.stdout
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["budget"] for row in rows] == ["2 steps", "3 steps", "0.02 min"]
    for row in rows:
        assert 0 <= float(row["mAD"]) <= 1
        assert float(row["training_seconds"]) > 0
        assert float(row["multiply_adds"]) > 1e6
        assert float(row["learnable_parameters"]) > 1e5
        assert float(row["images_per_second"]) > 1
    table = (tmp_path / "results.md").read_text()
    assert table.count("\n| DecAD |") == 3
    assert "threads" in table
    assert f"torch {torch.__version__}" in table
    assert (tmp_path / "results.png").stat().st_size > 1000
    again = run_benchmark("compare", *command)
    assert again.returncode == 0
    assert "DecAD-2" not in again.stdout.replace("results", "")


@pytest.mark.slow
def test_a_missing_folder_is_one_clear_line(tmp_path):
    result = run_benchmark("compare", "--data", tmp_path / "none")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == f"--data: no such folder: {tmp_path / 'none'}"


@pytest.mark.slow
def test_counts_are_at_most_the_papers():
    result = run_benchmark("count")
    assert result.returncode == 0, result.stderr[-3000:]
    last = result.stdout.strip().splitlines()[-1].split()
    parameters, multiply_adds = float(last[-4]), float(last[-2])
    assert 0.7 * 23.2 < parameters < 23.2
    assert 0.95 * 48.6 < multiply_adds < 48.6
