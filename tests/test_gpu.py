"""All that wants a GPU, in one command: what it runs, beside what, and until when."""

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path

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


def test_the_plain_decoder_is_run_as_long_as_the_decoupled_one(options):
    runs: dict[bool, set[tuple[str, ...]]] = {True: set(), False: set()}
    for job in gpu.jobs_of(options):
        name = job.name
        if name.startswith(("plain-", "decoupled-")):
            runs["decouple=false" in job.command].add(tuple(name.split("-", 1)[1:]))
    assert runs[True] == runs[False] != set()


def test_phases_and_steps_follow_the_arguments(options):
    options.phases, options.scale = ["race"], 0.001
    jobs = gpu.jobs_of(options)
    assert all(job.command[0].name == "compare.py" for job in jobs)
    steps = [str(job.command[job.command.index("--steps") + 1]) for job in jobs]
    assert sorted(steps) == ["15", "5", "5", "5", "5"]


def _job(name, code):
    return gpu.Job(name, ["-c", code])


def test_what_still_runs_at_the_end_of_the_time_is_ended_with_its_children(options, tmp_path, capsys):
    child = tmp_path / "child"
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    options.deadline = time.monotonic() + 3
    gpu.run(options, [_job("quick", "print('said')"), _job("long", code), _job("never", "")], lanes=1, threads=1)
    output = capsys.readouterr().out
    assert "quick: done" in output
    assert "long: cut off" in output
    assert "never" not in output
    assert "== quick.log\nsaid" in (options.output / "logs.txt").read_text()
    pid = int(child.read_text())
    for _ in range(50):
        if not _is_alive(pid):
            break
        time.sleep(0.1)
    assert not _is_alive(pid)


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.is_file() or status.read_text().split()[2] != "Z"  # ended, and not yet asked for by anybody


def test_a_job_that_fails_is_said_and_the_others_go_on(options, capsys):
    gpu.run(options, [_job("bad", "raise SystemExit(3)"), _job("good", "")], lanes=1, threads=1)
    output = capsys.readouterr().out
    assert "bad: failed (3)" in output
    assert "good: done" in output


def test_lanes_run_beside_each_other_and_no_more(options, monkeypatch):
    running, most = 0, 0

    class Fake(gpu.Job):
        def start(self, folder, threads):
            nonlocal running, most
            running += 1
            most = max(most, running)
            self.left = 2

        def is_over(self):
            nonlocal running
            self.left -= 1
            running -= self.left == 0
            return self.left == 0

    monkeypatch.setattr(gpu.time, "sleep", lambda _: None)
    gpu.run(options, [Fake(str(number), []) for number in range(7)], lanes=3, threads=1)
    assert (running, most) == (0, 3)


def test_points_of_all_curves_come_together(options):
    for run, step in itertools.product(("a", "b"), (1, 2)):
        folder = options.scratch / f"race-{run}" / "runs" / run
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "curve.jsonl").open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")
    gpu.collect(options)
    lines = [json.loads(line) for line in (options.output / "races.jsonl").read_text().splitlines()]
    assert lines == [
        {"race": f"race-{run}", "run": run, "step": step} for run, step in itertools.product(("a", "b"), (1, 2))
    ]
