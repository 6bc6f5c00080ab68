import math
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything

from anomalib_decad.runs import LastState
from anomalib_decad.runs.resume_command import resume_command
from conftest import ANOMALIB, ENCODER, IMAGE_SIZE, Losses, losses_of


class Signal(Callback):
    """Sends this process a signal in the middle of a step, or of a validation behind it."""

    def __init__(self, number, step, validates=False):
        self.number, self.step, self.validates = number, step, validates

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self.validates and trainer.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, *args):
        if self.validates and trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class SignalInBatch(Callback):
    """Sends this process SIGINT in one of its batches, counted from 1."""

    def __init__(self, batch):
        self.left = batch

    def on_before_backward(self, trainer, pl_module, loss):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGINT)


class Fail(Callback):
    """Fails in a step, with weights that are finite or not."""

    def __init__(self, step, breaks=False, error=RuntimeError):
        self.step, self.breaks, self.error = step, breaks, error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            if self.breaks:
                torch.nn.init.constant_(next(w for w in pl_module.parameters() if w.requires_grad), float("nan"))
            raise self.error("out of memory")


@pytest.fixture(autouse=True)
def _sigint():
    """Test processes beside each other ignore SIGINT."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_training_behind_the_step_and_leaves_its_state(
    number, status, make_engine, make_model, make_data, capsys
):
    options = {"max_steps": 50, "check_val_every_n_epoch": None, "val_check_interval": 50}
    losses, engine = Losses(), make_engine(Signal(number, 4), **options)
    engine._cache.args["callbacks"].append(losses)
    with pytest.raises(SystemExit) as exit_info:
        engine.fit(make_model(), datamodule=make_data())
    assert exit_info.value.code == status
    assert len(losses.values) == 4
    path = Path(engine.trainer.default_root_dir) / "weights" / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 4
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"The state of step 4 is in {path}. Resume the training with: "
        f"engine.fit(model, datamodule=datamodule, ckpt_path={str(path)!r})"
    )
    assert signal.getsignal(signal.SIGINT) in {signal.default_int_handler, signal.SIG_IGN}
    signal.signal(signal.SIGINT, signal.default_int_handler)

    model = make_model()
    losses = losses_of(make_engine, model, make_data(), max_steps=7, ckpt_path=path)
    assert len(losses) == 3
    assert math.isfinite(model.post_processor.image_threshold)


# An epoch has three steps, and there is no validation before the end.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "data"),
    [
        (1, {"sampling": "natural"}),
        (2, {}),
        (3, {}),
        (4, {"num_workers": 1}),
        (5, {"sampling": "natural", "num_workers": 1}),
        (8, {}),
    ],
)
def test_a_training_resumed_within_an_epoch_is_an_unbroken_one(step, data, make_engine, make_model, make_data):
    options = {"max_steps": 9, "check_val_every_n_epoch": None, "val_check_interval": 9}
    seed_everything(7)
    unbroken = losses_of(make_engine, make_model(), make_data(**data), **options)
    engine = make_engine(Signal(signal.SIGTERM, step), **options)
    seed_everything(7)
    model = make_model()
    seed_everything(7)
    with pytest.raises(SystemExit):
        engine.fit(model, datamodule=make_data(**data))
    path = Path(engine.trainer.default_root_dir) / "weights" / "last.ckpt"
    resumed = losses_of(make_engine, make_model(), make_data(**data), seed=8, ckpt_path=path, **options)
    assert resumed == pytest.approx(unbroken[step:], rel=1e-6)


def test_an_interrupt_of_a_validation_goes_on_behind_it(make_engine, make_model, make_data):
    engine = make_engine(Signal(signal.SIGINT, 3, validates=True), max_steps=9)
    with pytest.raises(SystemExit):
        engine.fit(make_model(), datamodule=make_data())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    path = Path(engine.trainer.default_root_dir) / "weights" / "last.ckpt"
    model = make_model()
    assert len(losses_of(make_engine, model, make_data(), max_steps=9, ckpt_path=path)) == 6
    assert math.isfinite(model.post_processor.image_threshold)


def test_a_training_that_is_terminated_behind_a_validation_has_not_succeeded(make_engine, make_model, make_data):
    class Terminate(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as exit_info:
        make_engine(Terminate(), max_steps=9).fit(make_model(), datamodule=make_data())
    assert exit_info.value.code == 143


def test_an_interrupt_of_the_last_validation_needs_one_more_step(make_engine, make_model, make_data, capsys):
    engine = make_engine(Signal(signal.SIGINT, 2, validates=True), max_steps=2)
    with pytest.raises(SystemExit):
        engine.fit(make_model(), datamodule=make_data())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert "Engine(max_steps=3, ...).fit(model" in capsys.readouterr().out
    path = Path(engine.trainer.default_root_dir) / "weights" / "last.ckpt"
    model = make_model()
    assert len(losses_of(make_engine, model, make_data(), max_steps=3, ckpt_path=path)) == 1
    assert math.isfinite(model.post_processor.image_threshold)


@pytest.mark.parametrize(("step", "validates"), [(3, False), (3, True), (6, True)])
def test_so_does_one_of_the_last_epoch(step, validates, make_engine, make_model, make_data, capsys):
    """Epochs of three steps: an interrupt in the last one lets the training end."""
    epochs = step // 3
    engine = make_engine(Signal(signal.SIGINT, step, validates=validates), max_epochs=epochs)
    model = make_model()
    if not validates:
        engine.fit(model, datamodule=make_data())
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert math.isfinite(model.post_processor.image_threshold)
        return
    with pytest.raises(SystemExit):
        engine.fit(model, datamodule=make_data())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert f"Engine(max_steps={step + 1}, max_epochs={epochs + 1}, ...).fit(model" in capsys.readouterr().out
    path = Path(engine.trainer.default_root_dir) / "weights" / "last.ckpt"
    model = make_model()
    more = {"max_steps": step + 1, "max_epochs": epochs + 1}
    assert len(losses_of(make_engine, model, make_data(), ckpt_path=path, **more)) == 1
    assert math.isfinite(model.post_processor.image_threshold)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_accumulated_batches_are_not_torn_apart(step, make_engine, make_model, make_data):
    """Six batches an epoch of which two make a step: an interrupt in the first of them waits for the second."""
    options = {"max_steps": 6, "accumulate_grad_batches": 2, "check_val_every_n_epoch": None, "val_check_interval": 12}
    data = {"train_batch_size": 2}
    seed_everything(7)
    unbroken = losses_of(make_engine, make_model(), make_data(**data), **options)
    engine = make_engine(SignalInBatch(step), **options)
    seed_everything(7)
    model = make_model()
    seed_everything(7)
    with pytest.raises(SystemExit):
        engine.fit(model, datamodule=make_data(**data))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    path = Path(engine.trainer.default_root_dir) / "weights" / "last.ckpt"
    done = 2 * torch.load(path, weights_only=True)["global_step"]
    assert done == step + step % 2
    resumed = losses_of(make_engine, make_model(), make_data(**data), seed=8, ckpt_path=path, **options)
    assert resumed == pytest.approx(unbroken[done:], rel=1e-6)


@pytest.mark.parametrize("batch_size", [2, 6])
def test_an_epoch_of_another_length_begins_anew(batch_size, make_engine, make_model, make_data, caplog):
    engine = make_engine(Signal(signal.SIGTERM, 2), max_steps=9)
    with pytest.raises(SystemExit):
        engine.fit(make_model(), datamodule=make_data())
    path = Path(engine.trainer.default_root_dir) / "weights" / "last.ckpt"
    losses = losses_of(make_engine, make_model(), make_data(train_batch_size=batch_size), max_steps=9, ckpt_path=path)
    assert len(losses) == 7
    assert f"within an epoch of 3 batches, and an epoch has {12 // batch_size} now: it begins anew" in caplog.text


# An image that cannot be read is an OSError: the training goes on when the file is mended.
@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_an_error_leaves_the_state_of_sound_weights_only(
    error, make_engine, make_model, make_data, monkeypatch, capsys
):
    engine = make_engine(Fail(2, error=error), max_steps=9)
    with pytest.raises(error, match="out of memory"):
        engine.fit(make_model(), datamodule=make_data())
    path = Path(engine.trainer.default_root_dir) / "weights" / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 2
    assert len(losses_of(make_engine, make_model(), make_data(), max_steps=4, ckpt_path=path)) == 2
    monkeypatch.setattr(LastState, "interval", 0.0)
    engine = make_engine(Fail(2, breaks=True, error=error), max_steps=9)
    capsys.readouterr()
    with pytest.raises(error, match="out of memory"):
        engine.fit(make_model(), datamodule=make_data())
    path = Path(engine.trainer.default_root_dir) / "weights" / "last.ckpt"
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert all(weights[name].isfinite().all() for name, _ in make_model().named_parameters())
    assert capsys.readouterr().out.splitlines()[-1].startswith("The state of step 2 is in ")


def test_a_state_every_few_minutes_until_the_end(make_engine, make_model, make_data, monkeypatch):
    monkeypatch.setattr(LastState, "interval", 0.0)
    steps = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            path = Path(trainer.default_root_dir) / "weights" / "last.ckpt"
            steps.append(torch.load(path, weights_only=True)["global_step"] if path.is_file() else 0)

    engine = make_engine(Look(), max_steps=5)
    engine.fit(make_model(), datamodule=make_data())
    assert steps == [0, 1, 2, 3, 4]
    folder = Path(engine.trainer.default_root_dir) / "weights"
    assert [path.name for path in folder.iterdir()] == ["lightning"]


def test_a_full_disk_does_not_end_the_training(make_engine, make_model, make_data, monkeypatch, caplog):
    monkeypatch.setattr(LastState, "interval", 0.0)

    class Full(Callback):
        def on_train_start(self, trainer, pl_module):
            (Path(trainer.default_root_dir) / "weights").write_text("in the way")

    engine = make_engine(Full(), max_steps=2, fast_dev_run=False, limit_val_batches=0)
    with pytest.raises(OSError, match="make room"):
        # anomalib's own checkpoint has no place, either, but the steps before were done.
        engine.fit(make_model(), datamodule=make_data())
    assert engine.trainer.global_step == 2
    assert "The state of the training is not saved: " in caplog.text


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["fit", "--config", "a b.yaml"], "anomalib fit --config 'a b.yaml' --ckpt_path last.ckpt"),
        (["train", "--ckpt_path", "x", "--data", "train"], "anomalib fit --data train --ckpt_path last.ckpt"),
    ],
)
def test_the_command(arguments, command):
    assert resume_command(Path("last.ckpt"), arguments=arguments) == command


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "devices"),
    [
        (signal.SIGINT, 1),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.exhaustive),
    ],
)
def test_the_command_line_prints_the_command_that_resumes(number, devices, tmp_path, encoder_weights, data_args):
    arguments = [
        "train", "--model", "DecAD", "--model.encoder", ENCODER, "--model.encoder_weights", encoder_weights,
        "--model.layers", "[1,2]", "--model.image_size", f"[{IMAGE_SIZE},{IMAGE_SIZE}]", *data_args,
        "--trainer.accelerator", "cpu", "--trainer.max_steps", 20_000, "--trainer.check_val_every_n_epoch", "null",
        "--trainer.val_check_interval", 20_000, "--default_root_dir", tmp_path / "my results",
        "--trainer.callbacks", "anomalib.callbacks.ModelCheckpoint", "--trainer.callbacks.dirpath", tmp_path / "steps",
        "--trainer.callbacks.every_n_train_steps", 1, "--trainer.devices", devices,
    ]  # fmt: skip
    if devices > 1:
        arguments += ["--trainer.strategy", "ddp"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [ANOMALIB, *map(str, arguments)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(900):
            if process.poll() is not None or list(tmp_path.glob("steps/*.ckpt")):
                break
            time.sleep(0.1)
        # As a terminal does: to all processes.
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (1 if number == signal.SIGINT else 143), output
    last = output.splitlines()[-1]
    state, _, command = last.partition(". Resume the training with: ")
    path = tmp_path / "my results" / "DecAD" / "factory" / "v0" / "weights" / "last.ckpt"
    assert state.endswith(f" is in {path}")
    step = torch.load(path, weights_only=True)["global_step"]
    program, *rest = shlex.split(command)
    assert program == "anomalib"
    assert rest[rest.index("--ckpt_path") + 1] == str(path)
    result = subprocess.run(
        [ANOMALIB, *rest, "--trainer.max_steps", str(step + 2)], env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"`max_steps={step + 2}` reached" in result.stderr + result.stdout
    assert step + 2 in {torch.load(file, weights_only=False)["global_step"] for file in tmp_path.glob("steps/*.ckpt")}
