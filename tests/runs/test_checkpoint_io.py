import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer


def _fails(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def _copies_a_half(source, target, **_kwargs):
    Path(target).write_bytes(Path(source).read_bytes()[:1000])
    _fails()


def _is_on_another_disk(*_args, **_kwargs):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.parametrize("uses_engine", [True, False])
def test_a_full_disk_leaves_the_checkpoint_of_before(
    make_engine, make_model, make_data, tmp_path, monkeypatch, uses_engine
):
    options = {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False, "logger": False}
    if uses_engine:
        engine = make_engine(max_steps=1)
        engine.fit(make_model(), datamodule=make_data())
        trainer = engine.trainer
    else:
        trainer = Trainer(default_root_dir=tmp_path, **options)
        trainer.fit(make_model(), datamodule=make_data())
    path = tmp_path / "good" / "model.ckpt"
    trainer.save_checkpoint(path)
    before = path.read_bytes()
    # What used to happen where temporary files are on another disk.
    monkeypatch.setattr(os, "rename", _is_on_another_disk)
    monkeypatch.setattr(shutil, "copyfile", _copies_a_half)
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=False)["global_step"] == 1
    monkeypatch.setattr(os, "fsync", _fails)
    with pytest.raises(OSError, match=r"model.ckpt of \d+ MiB cannot be written \(No space left on device\)"):
        trainer.save_checkpoint(path)
    assert [file.name for file in path.parent.iterdir()] == ["model.ckpt"]
    assert len(path.read_bytes()) == pytest.approx(len(before), rel=0.01)
    assert torch.load(path, weights_only=False)["global_step"] == 1


def test_another_checkpoint_plugin_stays(make_engine, make_model, make_data):
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    plugin = AsyncCheckpointIO()
    engine = make_engine(max_steps=1, plugins=[plugin])
    engine.fit(make_model(), datamodule=make_data())
    assert engine.trainer.strategy.checkpoint_io is plugin
