"""The decoupled models in the real anomalib command."""

import json

import pytest

from conftest import IMAGE_SIZE, anomalib


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "encoder", "args"),
    [
        ("DecoupledReverseDistillation", "resnet18", []),
        pytest.param(
            "DecoupledUniAD",
            "test_resnet",
            ["--model.neighbors", 3, "--model.hidden_dim", 16, "--model.num_layers", 1],
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "DecoupledMambaAD",
            "resnet18",
            ["--model.depths", "[2,2,2,2]", "--model.num_directions", 2],
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_an_adapter_from_two_process_training_to_export(model, encoder, args, tmp_path, weights_of, data_args):
    model_args = [
        "--model", model, "--model.encoder", encoder, "--model.encoder_weights", weights_of(encoder),
        "--model.image_size", f"[{IMAGE_SIZE},{IMAGE_SIZE}]", *args,
    ]  # fmt: skip
    anomalib(
        "train", *model_args, *data_args, "--seed_everything", 1, "--trainer.max_steps", 2, "--trainer.accelerator",
        "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp", "--default_root_dir", tmp_path,
    )  # fmt: skip
    (run,) = tmp_path.glob(f"{model}/factory/v0")
    assert json.loads((run / "metrics.json").read_text())["mean"]["image_AUROC"] is not None
    checkpoint = run / "weights" / "lightning" / "model.ckpt"
    anomalib(
        "export", *model_args, "--ckpt_path", checkpoint, "--export_type", "onnx", "--export_root", tmp_path / "export",
    )  # fmt: skip
    assert list((tmp_path / "export").rglob("*.onnx"))
