import contextlib
import math
import os
import signal
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything

from anomalib_decad.callbacks import LastCheckpoint
from conftest import ANOMALIB, ENCODER, IMAGE_SIZE, losses_of


class Stop(Callback):
    """Ends a training with an error at the end of a step, or in a validation after it."""

    def __init__(self, step, error=KeyboardInterrupt, validates=False, breaks=False):
        self.step, self.error, self.validates, self.breaks = step, error, validates, breaks

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not self.validates and trainer.global_step == self.step:
            if self.breaks:
                torch.nn.init.constant_(next(w for w in pl_module.parameters() if w.requires_grad), float("nan"))
            raise self.error("stopped")

    def on_validation_batch_start(self, trainer, *args):
        if self.validates and trainer.global_step == self.step:
            raise self.error("stopped")


class Interrupt(Callback):
    """Does what Ctrl-C does in the middle of a batch, counted from 1."""

    def __init__(self, batch):
        self.left = batch

    def on_before_backward(self, trainer, pl_module, loss):
        self.left -= 1
        if not self.left:
            signal.getsignal(signal.SIGINT)(signal.SIGINT, None)


@pytest.fixture(autouse=True)
def _sigint():
    """Test processes beside each other ignore SIGINT, and Lightning ignores it after an interrupt."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def interrupted(engine, model, data):
    """Train until an interrupt, and give the checkpoint that it leaves."""
    with pytest.raises((SystemExit, RuntimeError, OSError)):
        engine.fit(model, datamodule=data)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return Path(engine.trainer.default_root_dir) / "weights" / "last.ckpt"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_a_training_that_stops_leaves_its_state(error, make_engine, make_model, make_data):
    path = interrupted(make_engine(Stop(4, error), max_steps=50), make_model(), make_data())
    assert torch.load(path, weights_only=True)["global_step"] == 4
    model = make_model()
    assert len(losses_of(make_engine, model, make_data(), max_steps=7, ckpt_path=path)) == 3
    assert math.isfinite(model.post_processor.image_threshold)


# An epoch has three steps, and there is no validation before the end.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "data"),
    [(1, {"sampling": "natural"}), (2, {}), (3, {}), (4, {"num_workers": 1}), (8, {})],
)
def test_a_training_resumed_within_an_epoch_is_an_unbroken_one(step, data, make_engine, make_model, make_data):
    options = {"max_steps": 9, "check_val_every_n_epoch": None, "val_check_interval": 9}
    seed_everything(7)
    unbroken = losses_of(make_engine, make_model(), make_data(**data), **options)
    seed_everything(7)
    model = make_model()
    seed_everything(7)
    path = interrupted(make_engine(Stop(step), **options), model, make_data(**data))
    resumed = losses_of(make_engine, make_model(), make_data(**data), seed=8, ckpt_path=path, **options)
    assert resumed == pytest.approx(unbroken[step:], rel=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_ctrl_c_waits_for_the_end_of_a_step(batch, make_engine, make_model, make_data):
    """Six batches an epoch of which two make a step: an interrupt in the first of them waits for the second."""
    options = {"max_steps": 6, "accumulate_grad_batches": 2, "check_val_every_n_epoch": None, "val_check_interval": 12}
    data = {"train_batch_size": 2}
    seed_everything(7)
    unbroken = losses_of(make_engine, make_model(), make_data(**data), **options)
    seed_everything(7)
    model = make_model()
    seed_everything(7)
    path = interrupted(make_engine(Interrupt(batch), **options), model, make_data(**data))
    done = 2 * torch.load(path, weights_only=True)["global_step"]
    assert done == batch + batch % 2
    resumed = losses_of(make_engine, make_model(), make_data(**data), seed=8, ckpt_path=path, **options)
    assert resumed == pytest.approx(unbroken[done:], rel=1e-6)


def test_a_validation_that_was_interrupted_is_not_continued(make_engine, make_model, make_data):
    path = interrupted(make_engine(Stop(3, validates=True), max_steps=9), make_model(), make_data())
    model = make_model()
    assert len(losses_of(make_engine, model, make_data(), max_steps=9, ckpt_path=path)) == 6
    assert math.isfinite(model.post_processor.image_threshold)


def test_broken_weights_take_no_sound_ones_away(make_engine, make_model, make_data):
    last = LastCheckpoint(timedelta(0))
    path = interrupted(make_engine(Stop(2, RuntimeError, breaks=True), last, max_steps=9), make_model(), make_data())
    content = torch.load(path, weights_only=True)
    assert content["global_step"] == 1
    assert all(content["state_dict"][name].isfinite().all() for name, _ in make_model().named_parameters())


def test_a_state_every_few_minutes_until_the_end(make_engine, make_model, make_data):
    steps = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            path = Path(trainer.default_root_dir) / "weights" / "last.ckpt"
            steps.append(torch.load(path, weights_only=True)["global_step"] if path.is_file() else 0)

    engine = make_engine(Look(), LastCheckpoint(timedelta(0)), max_steps=5)
    engine.fit(make_model(), datamodule=make_data())
    assert steps == [0, 1, 2, 3, 4]
    folder = Path(engine.trainer.default_root_dir) / "weights"
    assert [path.name for path in folder.iterdir()] == ["lightning"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_does_not_end_the_training(make_engine, make_model, make_data, caplog):
    class Full(Callback):
        def on_train_start(self, trainer, pl_module):
            Path(trainer.default_root_dir).mkdir(parents=True, exist_ok=True)
            (Path(trainer.default_root_dir) / "weights").write_text("in the way")

    engine = make_engine(Full(), LastCheckpoint(timedelta(0)), max_steps=2, limit_val_batches=0)
    with pytest.raises(OSError, match="weights"):
        # anomalib's own checkpoint has no place, either, but the steps before were done.
        engine.fit(make_model(), datamodule=make_data())
    assert engine.trainer.global_step == 2
    assert "The state of the training is not saved: " in caplog.text


def test_without_checkpoints_there_is_none(make_engine, make_model, make_data):
    engine = make_engine(Stop(2, RuntimeError), max_steps=5, barebones=True)
    with pytest.raises(RuntimeError, match="stopped"):
        engine.fit(make_model(), datamodule=make_data())
    assert not list(Path(engine.trainer.default_root_dir).rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_leaves_a_checkpoint_to_resume_from(number, tmp_path, encoder_weights, data_args):
    arguments = [
        ANOMALIB, "fit", "--model", "DecAD", "--model.encoder", ENCODER, "--model.encoder_weights", encoder_weights,
        "--model.layers", "[1,2]", "--model.image_size", f"[{IMAGE_SIZE},{IMAGE_SIZE}]", *data_args,
        "--trainer.accelerator", "cpu", "--default_root_dir", tmp_path,
    ]  # fmt: skip
    steps = ["--trainer.max_steps", "20000", "--trainer.check_val_every_n_epoch", "null",
             "--trainer.val_check_interval", "20000", "--trainer.callbacks", "anomalib.callbacks.ModelCheckpoint",
             "--trainer.callbacks.dirpath", tmp_path / "steps", "--trainer.callbacks.every_n_train_steps", "1",
             "--trainer.callbacks.save_top_k", "-1"]  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, arguments + steps)), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    try:
        # The steps appear one by one: after the first the training is under way.
        while process.poll() is None and not list(tmp_path.glob("steps/*.ckpt")):
            with contextlib.suppress(subprocess.TimeoutExpired):
                lines.append(process.communicate(timeout=0.2)[0])
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    (path,) = tmp_path.rglob("last.ckpt")
    step = torch.load(path, weights_only=True)["global_step"]
    assert f"saved checkpoint to {path}" in " ".join(output.split()), output
    result = subprocess.run(
        list(map(str, [*arguments, "--trainer.max_steps", step + 2, "--ckpt_path", path])),
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"`max_steps={step + 2}` reached" in result.stderr + result.stdout
