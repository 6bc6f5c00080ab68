"""What the real anomalib command prints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ENCODER, IMAGE_SIZE, anomalib

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_args(encoder_weights):
    return [
        "--model.encoder", ENCODER, "--model.encoder_weights", encoder_weights, "--model.layers", "[1,2,3]",
        "--model.image_size", f"[{IMAGE_SIZE},{IMAGE_SIZE}]", "--model.invertible.hidden_dim", "8",
        "--model.invertible.num_blocks", "1", "--model.decoupler.num_prototypes", "16",
    ]  # fmt: skip


# Runs the command for each list of arguments, in forks of a process that has imported it once.
FORKS = """
import json, os, sys
from anomalib.cli.cli import main
codes = []
for number, arguments in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if not child:
        for descriptor in (1, 2):
            os.dup2(os.open(f"{number}.{descriptor}", os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv, code = ["anomalib", *arguments], 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stderr.flush()
        os._exit(code)  # what the parent has begun is its own to end
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""

WRONG = [
    (["--model.encoder", "vit_tiny"], "timm has no model 'vit_tiny'"),
    (["--model.image_size", "[70,64]"], "64 x 64 would do"),
    (["--model.layers", "[1,2,30]"], "layers"),
    (["--model.decoupler.abnormal_fraction", "2"], "abnormal_fraction"),
    (["--data.categories", "[bolt]"], "no category 'bolt'; valid names are"),
    (["--model.encoder_weights", "nowhere.pth"], "nowhere.pth"),
    (["--model.encoder_weights", "null"], "encoder_weights"),
    (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt: give the path of one (--ckpt_path)"),
    (["--data.root", __file__], "there is no folder"),
    (["--data.eval_batch_size", "0"], "eval_batch_size must be at least 1"),
    (["--model.image_size", "[0,0]"], "image_size must be two positive numbers"),
    (["--trainer.accelerator", "tpu"], "torch_xla"),
]


def assert_one_line(returncode, stderr, message):
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert returncode == 2


def test_a_wrong_argument_is_one_line(tmp_path, model_args, data_args):
    args, message = WRONG[0]
    result = anomalib(
        "train", "--model", "DecAD", *model_args, *data_args, *args, "--default_root_dir", tmp_path, check=False
    )
    assert_one_line(result.returncode, result.stderr, message)
    assert not list(tmp_path.iterdir())


def test_so_is_each_other(tmp_path, model_args, data_args):
    root, output = tmp_path / "root", tmp_path / "output"
    output.mkdir()
    fixed = ["train", "--model", "DecAD", *model_args, *data_args, "--default_root_dir", root]
    commands = [list(map(str, [*fixed, *args])) for args, _ in WRONG[1:]]
    commands += [["train", "--model", "DecAD"], ["export", "--model", "DecAD", "--export_type", "onnx"]]
    messages = [message for _, message in WRONG[1:]]
    messages += ["train needs images: give them with --data", "needs a trained model: give the checkpoint"]
    result = subprocess.run(
        [sys.executable, "-c", FORKS, json.dumps(commands)], cwd=output, capture_output=True, text=True, timeout=200,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    codes = json.loads(result.stdout)
    assert len(codes) == len(commands)
    for number, (code, message) in enumerate(zip(codes, messages, strict=True)):
        assert_one_line(code, (output / f"{number}.2").read_text(), message)
    assert not root.exists()


@pytest.mark.parametrize("args", [["--data.categories", "[bolt]"], ["--model.encoder_weights", "null"]])
def test_tracebacks_on_request(args, tmp_path, model_args, data_args):
    result = anomalib(
        "train", "--model", "DecAD", *model_args, *data_args, *args, "--trainer.max_steps", 2,
        "--default_root_dir", tmp_path, check=False, ANOMALIB_DECAD_VERBOSE="1",
    )  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_a_fault_keeps_its_traceback(tmp_path, model_args, data_args):
    code = """
import sys
import anomalib_decad
from anomalib.cli.cli import main
def fault(self):
    return {}["a fault"]
for name in sys.argv.pop(1).split():
    setattr(anomalib_decad.DecAD, name, fault)
sys.argv[0] = "anomalib"
main()
"""
    for method in ("prepare", "training_loader"):
        result = subprocess.run(
            [
                sys.executable, "-c", code, method, "train", "--model", "DecAD", *map(str, model_args),
                *map(str, data_args), "--trainer.max_steps", "2", "--default_root_dir", str(tmp_path),
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert result.returncode == 1, result.stderr
        assert "Traceback" in result.stderr
        assert "KeyError: 'a fault'" in result.stderr
        assert not list(tmp_path.iterdir())


def test_other_models_behave_as_before(tmp_path, mvtec_root):
    result = anomalib(
        "train", "--model", "Padim", "--data", "MultiCategory", "--data.datamodule", "MVTecAD", "--data.root",
        mvtec_root, "--data.categories", "[bolt]", "--default_root_dir", tmp_path, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "FutureWarning" in result.stderr
    for output in (result.stdout, result.stderr):
        assert "Initializing Padim model" in output


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_args, data_args):
    root = tmp_path_factory.mktemp("trained")
    result = anomalib(
        "train", "--model", "DecAD", *model_args, *data_args, "--trainer.max_epochs", 3, "--trainer.accelerator", "cpu",
        "--default_root_dir", root,
    )  # fmt: skip
    return result, root / "DecAD" / "factory"


NOISE = (
    "is deprecated", "module(s) in eval mode", "will override", "OpenVINO is possibly", "litlogger",
    "Overriding num_sanity", "Found the dataset", "Initializing DecAD",
)  # fmt: skip


def test_a_training_prints_each_message_once(trained):
    result, _ = trained
    for text in NOISE:
        assert text not in result.stdout + result.stderr
    for text in ("factory: 12 train images", "`max_epochs=3` reached", "Training took"):
        assert (result.stdout + result.stderr).count(text) == 1, text
    assert not result.stderr


def test_a_warning_is_said_once(tmp_path, model_args, mvtec_root):
    shutil.copytree(mvtec_root / "bolts", tmp_path / "data" / "bolts")
    shutil.rmtree(tmp_path / "data" / "bolts" / "test" / "square")
    shutil.rmtree(tmp_path / "data" / "bolts" / "ground_truth")
    result = anomalib(
        "fit", "--model", "DecAD", *model_args, "--data", "MultiCategory", "--data.datamodule", "MVTecAD",
        "--data.root", tmp_path / "data", "--data.num_workers", 0, "--trainer.max_epochs", 3,
        "--default_root_dir", tmp_path,
    )  # fmt: skip
    assert (result.stdout + result.stderr).count("No defect among the validation images of bolts") == 1


def test_all_messages_on_request(tmp_path, model_args, data_args):
    result = anomalib(
        "fit", "--model", "DecAD", *model_args, *data_args, "--trainer.fast_dev_run", "true", "--default_root_dir",
        tmp_path, ANOMALIB_DECAD_VERBOSE="1",
    )  # fmt: skip
    for output in (result.stdout, result.stderr):
        assert "Initializing DecAD model" in output
    assert "FutureWarning" in result.stderr


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("torch", "pt"),
        pytest.param("onnx", "onnx", marks=pytest.mark.exhaustive),
        pytest.param("openvino", "xml", marks=pytest.mark.exhaustive),
    ],
)
def test_an_export_ends_with_its_file(kind, suffix, trained, tmp_path, model_args):
    checkpoint = trained[1] / "latest" / "weights" / "lightning" / "model.ckpt"
    result = anomalib(
        "export", "--model", "DecAD", *model_args, "--ckpt_path", checkpoint, "--export_type", kind, "--export_root",
        tmp_path,
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert len(lines) < 20
    assert lines[-1].endswith(f"{tmp_path}/weights/{kind}/model.{suffix}")
    assert "Error" not in result.stderr


def test_latest_can_be_moved(trained):
    latest = trained[1] / "latest"
    assert latest.readlink() == Path("v0")


def test_the_preparation_is_told_in_a_file(trained):
    lines = [line for line in trained[0].stdout.splitlines() if "anomalib_decad.progress" in line]
    assert [line.partition("INFO - ")[2].partition(":")[0] for line in lines] == [
        "Looking at training images", "Fitting to their patches",
    ]  # fmt: skip
    assert lines == [line for line in lines if "took" in line]


def test_each_number_is_printed_once(trained):
    output = trained[0].stdout
    assert "FLOPs" not in output
    assert "DataLoader 0" not in output
    # Once in the table of metrics, once in that of decisions.
    assert output.count("bolts") == 2


def test_epochs_are_counted_from_one(trained):
    assert "Epoch 3/3" in trained[0].stdout
