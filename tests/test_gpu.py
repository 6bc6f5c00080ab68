"""All that wants a GPU, in one command: what it runs, beside what, and until when."""

import argparse
import sys
import time

import pytest

import compare
import experiments
import gpu

_PARSERS = {"compare.py": compare.parse, "experiments.py": experiments.parse}


@pytest.fixture
def options(mvtec_root, tmp_path):
    folders = {"output": tmp_path / "out", "scratch": tmp_path / "scratch"}
    for folder in folders.values():
        folder.mkdir()
    return argparse.Namespace(
        data=mvtec_root, categories=["bolts", "cloth"], encoder="vit_small_patch14_dinov2", scale=1, points=5,
        workers=0, on_gpu=True, accelerator="gpu", seeds=[0, 1, 2], phases=["race", "experiments"],
        deadline=time.monotonic() + 60, **folders,
    )  # fmt: skip


@pytest.mark.parametrize("on_gpu", [True, False])
def test_each_command_is_one_that_its_script_takes(options, monkeypatch, on_gpu):
    options.on_gpu, options.accelerator = on_gpu, "gpu" if on_gpu else "cpu"
    jobs = gpu.jobs_of(options)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for job in jobs:
        path, *arguments = job.command
        monkeypatch.setattr(sys, "argv", list(map(str, [path, *arguments])))
        parsed = _PARSERS[path.name]()
        assert parsed.data == options.data
        assert parsed.categories == options.categories
