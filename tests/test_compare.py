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
def test_counts_meet_the_paper_within_five_per_cent():
    result = run_benchmark("count")
    assert result.returncode == 0, result.stderr[-3000:]
    last = result.stdout.strip().splitlines()[-1].split()
    parameters, multiply_adds = float(last[-4]), float(last[-2])
    assert parameters == pytest.approx(23.2, rel=0.05)
    assert multiply_adds == pytest.approx(48.6, rel=0.05)


@pytest.mark.slow
def test_a_race_with_a_curve_goes_on_where_it_was_cut_off_and_preloaded_images_score_the_same(
    encoder_weights, mvtec_root, tmp_path
):
    arguments = {"DecAD": {"encoder_weights": str(encoder_weights), "layers": [1, 2]}}
    command = [
        "--data", mvtec_root, "--models", "DecAD", "--encoder", ENCODER, "--image-size", 64, "--steps", 4,
        "--batch-size", 4, "--arguments", json.dumps(arguments),
    ]  # fmt: skip

    def run(folder, *options):
        result = run_benchmark("compare", *command, "--output", folder, *options)
        assert result.returncode == 0, result.stderr[-3000:] + result.stdout
        with (folder / "results.csv").open() as file:
            (row,) = csv.DictReader(file)
        file = folder / "runs" / "DecAD-4-seed0" / "curve.jsonl"
        return float(row["mAD"]), [json.loads(line) for line in file.read_text().splitlines()]

    expected, curve = run(tmp_path / "plain", "--score-every", 2)
    assert [point["step"] for point in curve] == [2, 4]
    assert curve[1]["metrics"]["mean"]["mAD"] == pytest.approx(expected)
    assert 0 < curve[0]["training_seconds"] <= curve[1]["training_seconds"]
    lines = (tmp_path / "plain" / "results.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| model | budget | step |"))
    rows = [dict(zip(header.split(" | "), line.split(" | "), strict=True)) for line in lines[lines.index(header) + 2 :]]
    assert [row["step"] for row in rows] == ["2", "4"]
    for row, point in zip(rows, curve, strict=True):
        for name in ("bolts", "cloth |"):
            value = 100 * point["metrics"][name.removesuffix(" |")]["mAD"]
            assert float(row[name].removesuffix(" |")) == pytest.approx(value, abs=0.051)

    folder = tmp_path / "preloaded"
    preloaded, _ = run(folder, "--score-every", 2, "--preload")
    assert preloaded == pytest.approx(expected, abs=0.02)

    # Cut off after the first point, as by a kill.
    (folder / "runs" / "DecAD-4-seed0.json").unlink()
    points = folder / "runs" / "DecAD-4-seed0" / "curve.jsonl"
    points.write_text(points.read_text().splitlines()[0] + "\n")
    again, resumed = run(folder, "--score-every", 2, "--preload")
    assert next(point["step"] for point in resumed) == 2
    assert again == pytest.approx(preloaded, abs=0.05)
