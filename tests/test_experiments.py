"""The experiment runner, on the tiny encoder."""

import json
import math

import cv2
import pytest

from anomalib_decad import DecAD
from anomalib_decad.metrics import METRICS
from conftest import ENCODER, run_benchmark


@pytest.mark.slow
def test_each_run_is_a_line_and_features_are_computed_once(encoder_weights, mvtec_root, tmp_path):
    log = tmp_path / "log.jsonl"
    command = [
        "--data", mvtec_root, "--encoder", ENCODER, "--encoder-weights", encoder_weights, "--image-size", 64,
        "--layers", 1, 3, "--set", "invertible.hidden_dim=8", "decoupler.num_prototypes=16",
        "--steps", 3, "--batch-size", 4, "--score-at", 0, 2, 3, "--features", tmp_path / "features", "--log", log,
        "--choose", "bolts",
    ]  # fmt: skip
    result = run_benchmark("experiments", *command, "--vary", "decouple=true,false", "--seeds", 0, 1)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["settings"]["decouple"], line["seed"]) for line in lines] == [
        (True, 0), (True, 1), (False, 0), (False, 1),
    ]  # fmt: skip
    for line in lines:
        assert line["images"] == {"train": {"bolts": 6, "cloth": 6}, "test": {"bolts": 6, "cloth": 6}}
        assert set(line["metrics"]) == {"bolts", "cloth", "mean"}
        assert all(0 <= line["metrics"]["cloth"][metric] <= 1 for metric in METRICS)
        assert [point["step"] for point in line["progress"]] == [0, 2, 3]
        last = line["progress"][-1]
        assert last["metrics"]["both"] == line["metrics"]
        assert all(0 <= value <= 1 for row in last["patch_auroc"].values() for value in row.values())
        assert math.isfinite(last["losses"]["train/loss"])
    # Without decoupling nothing is removed.
    rows = lines[-1]["progress"][-1]["patch_auroc"].values()
    assert all(row["error"] == row["kept"] for row in rows)
    table = result.stdout.splitlines()[-2:]
    assert all(row.count(" ± ") == 10 for row in table)

    files = {path: path.stat().st_ino for path in (tmp_path / "features").rglob("*.npy")}
    kept = "--checkpoints", tmp_path / "kept"
    again = run_benchmark("experiments", *command, "--vary", "delta=1.0", "--one-class", *kept)
    assert again.returncode == 0, again.stderr[-3000:]
    checkpoints = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert [name.partition("seed")[2] for name in checkpoints] == ["0-bolts.ckpt", "0-cloth.ckpt"]
    assert DecAD.load_from_checkpoint(tmp_path / "kept" / checkpoints[0]).hparams["delta"] == 1.0
    line = json.loads(log.read_text().splitlines()[-1])
    assert line["one_class"]
    each = [line["metrics"][category] for category in ("bolts", "cloth")]
    assert line["metrics"]["mean"]["pixel_AP"] == pytest.approx(sum(row["pixel_AP"] for row in each) / 2, abs=2e-5)
    assert [set(point["metrics"]["both"]) for point in line["progress"]] == 3 * [{"bolts", "mean"}] + 3 * [
        {"cloth", "mean"}
    ]
    assert files == {path: path.stat().st_ino for path in (tmp_path / "features").rglob("*.npy")}
    assert len(log.read_text().splitlines()) == 5
    unknown = run_benchmark("experiments", *command, "--vary", "deltas=1.0")
    assert unknown.stderr.strip().splitlines()[-1] == "DecAD has no argument 'deltas'"

    energies = run_benchmark("synthesis", *command)
    assert energies.returncode == 0, energies.stderr[-3000:]
    rows = [row.strip("| ").split(" | ") for row in energies.stdout.splitlines()[2:]]
    assert len(rows) == 8
    medians = {name: float(energy) for name, energy in rows}
    assert medians["features, 1 step"] <= medians["features, 0 steps"]

    maps = run_benchmark("anomaly_map", *command)
    assert maps.returncode == 0, maps.stderr[-3000:]
    rows = dict(row.strip("| ").split(" | ", 1) for row in maps.stdout.splitlines() if row.startswith("| "))
    assert len(rows) == 2 + 2 * 2 + 4 + 4 + 5  # with the header
    expected = [100 * lines[0]["metrics"]["mean"][name] for name in (*METRICS, "mAD")]
    assert [float(cell) for cell in rows["default"].split(" | ")[:8]] == pytest.approx(expected, abs=0.1)
    assert rows["blur_sigma 0"] != rows["default"]


def test_the_leakage_is_plotted(tmp_path):
    log = tmp_path / "log.jsonl"
    points = [
        {"step": step, "patch_auroc": {name: {"error": 0.6 + step / 100, "kept": 0.5} for name in ("bolts", "cloth")}}
        for step in (0, 20)
    ]
    line = {"name": "leakage", "settings": {"decouple": False}, "progress": points}
    log.write_text("\n".join(json.dumps(entry) for entry in (line, {**line, "name": "other", "settings": {}})))
    result = run_benchmark("leakage", "--log", log, "--output", tmp_path / "leakage.png")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "decouple False: 0.800, nothing removed 0.500\n"
    assert cv2.imread(str(tmp_path / "leakage.png")).std() > 10
    result = run_benchmark("leakage", "--log", tmp_path / "none")
    assert result.returncode == 1
    assert "has no run 'leakage'" in result.stderr
