"""The benchmark of speed, on the tiny encoder."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import throughput


def test_the_time_of_a_call_is_that_of_a_call(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    seconds = throughput.time_of(lambda: now.__setitem__(0, now[0] + 0.01), 0.1, torch.device("cpu"))
    assert seconds == pytest.approx(0.01)


def test_the_time_of_a_step_leaves_out_the_warm_up(monkeypatch):
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    timer, module = throughput.StepTimer(warm_up=2), SimpleNamespace(device=torch.device("cpu"))
    for step in range(1, 6):
        timer.on_train_batch_end(SimpleNamespace(global_step=step, max_steps=5), module)
    assert timer.seconds == pytest.approx(2.0)  # 3 steps in 6 seconds


def test_one_that_fails_is_noted_and_the_others_are_measured(monkeypatch, tmp_path, capsys):
    log = tmp_path / "folder" / "throughput.jsonl"

    def infer(_args, name, batch_size, *_):
        if name == "Dinomaly":
            raise RuntimeError("out of memory")
        return {"ms": 10.0, "images_per_second": 100.0 * batch_size}

    monkeypatch.setattr(throughput, "infer", infer)
    command = ["throughput.py", "--accelerator", "cpu", "--train-batches", "--batches", "1", "8", "--log", str(log)]
    monkeypatch.setattr(sys, "argv", command)
    throughput.main()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["model"], line["batch"]) for line in lines] == [
        ("DecAD", 1), ("Dinomaly", 1), ("DecAD", 8), ("Dinomaly", 8),
    ]  # fmt: skip
    assert [line.get("error") for line in lines] == [None, "RuntimeError: out of memory"] * 2
    assert all(line["image_size"] == 280 and "torch" in line for line in lines)
    table = capsys.readouterr().out
    assert "| eager | fp32 | 1 | 100.0 | failed |" in table
    assert "| eager | fp32 | 8 | 800.0 | failed |" in table
