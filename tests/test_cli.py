"""The real anomalib command, in subprocesses."""

import csv
import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from anomalib.engine import Engine

from anomalib_decad import DecAD, MultiCategory
from conftest import ENCODER, IMAGE_SIZE, anomalib

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_args(encoder_weights):
    return [
        "--model.encoder", ENCODER, "--model.encoder_weights", encoder_weights, "--model.layers", "[1,2,3]",
        "--model.image_size", f"[{IMAGE_SIZE},{IMAGE_SIZE}]", "--model.invertible.hidden_dim", "8",
        "--model.invertible.num_blocks", "1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trainer_args():
    return ["--trainer.accelerator", "cpu", "--seed_everything", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_args, data_args, trainer_args):
    """Results of `anomalib train --model DecAD --data MultiCategory`."""
    root = tmp_path_factory.mktemp("train")
    result = anomalib(
        "train", "--model", "DecAD", *model_args, *data_args, *trainer_args,
        "--trainer.max_steps", 3, "--default_root_dir", root,
    )  # fmt: skip
    (run,) = root.glob("DecAD/factory/v0")
    return result, run


def test_train_prints_a_table_and_writes_results(trained):
    result, run = trained
    assert "mean" in result.stdout
    assert "bolts" in result.stdout
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["categories"]) == {"bolts", "cloth"}
    assert (run / "weights" / "lightning" / "model.ckpt").is_file()
    heatmaps = sorted(path.relative_to(run / "images").as_posix() for path in run.glob("images/**/*.png"))
    assert len(heatmaps) == 12
    assert heatmaps[0] == "bolts/test/good/000.png"


def test_other_names_in_every_subcommand(model_args, data_args, mvtec_root):
    code = """
import json, sys
from anomalib.cli import AnomalibCLI
import anomalib_decad
for args in json.loads(sys.argv[1]):
    cli = AnomalibCLI(args, run=False)
    assert type(cli.model) is anomalib_decad.DecAD, args
print("all")
"""
    model, data = [str(arg) for arg in model_args], [str(arg) for arg in data_args]
    runs = [
        [command, "--model", name, *model, *rest]
        for name in ("anomalib_decad.DecAD", "anomalib.models.DecAD")
        for command, rest in (
            ("fit", data),
            ("validate", data),
            ("test", data),
            ("predict", ["--data", str(mvtec_root)]),
            ("predict", data),
            ("export", ["--export_type", "torch"]),
        )
    ]
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(runs)], capture_output=True, text=True, timeout=200, check=False
    )
    assert result.stdout.endswith("all\n"), result.stderr[-3000:]


@pytest.mark.parametrize("command", [pytest.param("validate", marks=pytest.mark.exhaustive), "test"])
def test_evaluation_of_a_checkpoint(command, trained, tmp_path, model_args, data_args, trainer_args):
    checkpoint = trained[1] / "weights" / "lightning" / "model.ckpt"
    anomalib(
        command, "--model", "DecAD", *model_args, *data_args, *trainer_args,
        "--ckpt_path", checkpoint, "--default_root_dir", tmp_path,
    )  # fmt: skip
    if command == "test":
        (metrics,) = tmp_path.glob("DecAD/**/metrics.json")
        assert json.loads(metrics.read_text()) == json.loads((trained[1] / "metrics.json").read_text())


def test_predict_a_folder_without_the_models_arguments(trained, tmp_path, mvtec_root, trainer_args):
    checkpoint = trained[1] / "weights" / "lightning" / "model.ckpt"
    anomalib(
        "predict", "--model", "DecAD", *trainer_args, "--data", mvtec_root / "bolts" / "test" / "square",
        "--ckpt_path", checkpoint, "--default_root_dir", tmp_path,
    )  # fmt: skip
    assert len(list(tmp_path.rglob("*.png"))) == 3


@pytest.mark.parametrize(
    ("kind", "suffix", "args"),
    [
        ("torch", "pt", []),
        ("onnx", "onnx", ["--input_size", f"[{IMAGE_SIZE},{IMAGE_SIZE}]"]),
        pytest.param("openvino", "xml", ["--compression_type", "FP16"], marks=pytest.mark.exhaustive),
        pytest.param(
            "openvino",
            "xml",
            ["--compression_type", "INT8_PTQ", "--input_size", "[50,40]"],
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_export(kind, suffix, args, trained, tmp_path, model_args, data_args, trainer_args):
    checkpoint = trained[1] / "weights" / "lightning" / "model.ckpt"
    data = data_args if "INT8_PTQ" in args else []
    anomalib(
        "export", "--model", "DecAD", *model_args, *trainer_args, "--ckpt_path", checkpoint,
        "--export_type", kind, "--export_root", tmp_path, *args, *data,
    )  # fmt: skip
    assert list(tmp_path.rglob(f"*.{suffix}"))


def test_config_file(tmp_path, encoder_weights, mvtec_root):
    config = {
        "model": {
            "class_path": "anomalib.models.DecAD",
            "init_args": {
                "encoder": ENCODER,
                "encoder_weights": str(encoder_weights),
                "layers": [1, 2],
                "image_size": [IMAGE_SIZE, IMAGE_SIZE],
            },
        },
        "data": {
            "class_path": "MultiCategory",
            "init_args": {
                "datamodule": {"class_path": "MVTecAD", "init_args": {"root": str(mvtec_root)}},
                "categories": ["cloth"],
                "num_workers": 0,
            },
        },
        "trainer": {"accelerator": "cpu", "fast_dev_run": True},
        "default_root_dir": str(tmp_path),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    anomalib("fit", "--config", path)


def test_the_saved_config_repeats_the_run(trained, tmp_path):
    result = anomalib("train", "--config", trained[1] / "config.yaml", "--default_root_dir", tmp_path)
    (run,) = tmp_path.glob("DecAD/factory/v0")
    # Not the same numbers: anomalib's command line does not apply --seed_everything.
    metrics = (json.loads((folder / "metrics.json").read_text()) for folder in (run, trained[1]))
    assert len({tuple(content["categories"]) for content in metrics}) == 1
    assert "bolts" in result.stdout


def test_resume_from_the_command_line(trained, tmp_path, model_args, data_args, trainer_args):
    checkpoint = trained[1] / "weights" / "lightning" / "model.ckpt"
    result = anomalib(
        "fit", "--model", "DecAD", *model_args, *data_args, *trainer_args, "--trainer.max_steps", 5,
        "--ckpt_path", checkpoint, "--default_root_dir", tmp_path, "--seed_everything", 123,
    )  # fmt: skip
    assert "`max_steps=5` reached" in result.stderr + result.stdout
    assert "Restored all states from the checkpoint" in result.stderr + result.stdout
    assert torch.load(next(tmp_path.rglob("model.ckpt")), weights_only=True)["global_step"] == 5


def test_two_process_data_parallel(tmp_path, model_args, data_args, mvtec_root):
    """Their number of test images cannot be divided, and a test by one process counts the same."""
    root = tmp_path / mvtec_root.name
    shutil.copytree(mvtec_root, root)
    (root / "cloth" / "test" / "good" / "002.png").unlink()
    data_args = [root if arg == mvtec_root else arg for arg in data_args]
    anomalib(
        "train", "--model", "DecAD", *model_args, *data_args, "--seed_everything", 1, "--trainer.max_steps", 2,
        "--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp", "--default_root_dir",
        tmp_path / "two",
    )  # fmt: skip
    (metrics,) = tmp_path.glob("two/DecAD/**/metrics.json")
    assert json.loads(metrics.read_text())["mean"]["image_AUROC"] is not None
    # One table and one report, of the images of both.
    with metrics.with_name("predictions.csv").open(newline="") as file:
        paths = [line["path"] for line in csv.DictReader(file)]
    assert len(paths) == len(set(paths)) == 11
    report = metrics.with_name("report.html").read_text()
    assert report.count("6 of 6 shown") == 1
    assert report.count("5 of 5 shown") == 1
    checkpoint = metrics.parent / "weights" / "lightning" / "model.ckpt"
    anomalib(
        "test", "--model", "DecAD", *model_args, *data_args, "--trainer.accelerator", "cpu", "--ckpt_path", checkpoint,
        "--default_root_dir", tmp_path / "one",
    )  # fmt: skip
    (other,) = tmp_path.glob("one/DecAD/**/metrics.json")
    one, two = (json.loads(path.read_text()) for path in (other, metrics))
    assert one["categories"].keys() == two["categories"].keys()
    for name, row in {**one["categories"], "mean": one["mean"]}.items():
        assert {**two["categories"], "mean": two["mean"]}[name] == pytest.approx(row, abs=1e-5), name
    # So are the thresholds of a validation by one process.
    model = DecAD.load_from_checkpoint(checkpoint, visualizer=False)
    before = [model.post_processor.limits(name) for name in (None, "bolts", "cloth")]
    assert before[1] != before[2]
    data = MultiCategory("MVTecAD", root=root, num_workers=0)
    Engine(accelerator="cpu", logger=False, default_root_dir=tmp_path).validate(model, datamodule=data)
    for name, limits in zip((None, "bolts", "cloth"), before, strict=True):
        assert model.post_processor.limits(name) == pytest.approx(limits, rel=1e-4), name


def test_help_describes_the_arguments():
    result = anomalib("train", "--model.help", "DecAD")
    output = result.stdout
    for text in ("--model.encoder", "--model.delta", "Radius of the synthetic anomalies", "--model.layers"):
        assert text in output
    output = anomalib("train", "--model.help", "DecoupledMambaAD").stdout
    for text in ("--model.decouple", "--model.num_directions", "that a state space block scans in", "--model.layers"):
        assert text in output
    assert "--data.sampling" in anomalib("train", "--data.help", "MultiCategory").stdout
