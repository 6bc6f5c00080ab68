# SPDX-License-Identifier: Apache-2.0
"""All that wants a GPU, in a few minutes: tests, speed, races at full length, experiments.

usage: python benchmarks/gpu.py --data ROOT --output DIR [--phases tests speed race experiments] [--minutes 8]
       python benchmarks/gpu.py --data ROOT --output DIR --accelerator cpu --scale 0.001      # tries all of it on a CPU

Tests and speed run alone, one after the other; races and experiments then run beside each other in --lanes processes
until the time is over. All results are written as they come, so that a cut loses nothing: tests.log, throughput.jsonl,
races.jsonl (a line for each point of a curve), experiments.jsonl and logs.txt (the end of each process's output).
The seconds in races.jsonl are of processes that share the device; speed alone is in throughput.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common

_FOLDER = Path(__file__).parent
_LOG_LINES = 25


@dataclass
class Job:
    """A command whose output goes to a file.

    Args:
        name (str): Name of the file.
        command (Sequence[object]): Arguments of Python.
        process (subprocess.Popen | None): The process, once it runs.
    """

    name: str
    command: Sequence[object]
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self, folder: Path, threads: int) -> None:
        """Start the process."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        with (folder / f"{self.name}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, self.command)], stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def stop(self) -> None:
        """End the process, and those that it has started."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def is_over(self) -> bool:
        """Whether the process has ended."""
        return self.process is not None and self.process.poll() is not None


def script(name: str, args: argparse.Namespace, *arguments: object) -> list[object]:
    """Write the command of a benchmark."""
    data = ["--data", args.data, *(["--categories", *args.categories] if args.categories else [])]
    return [_FOLDER / f"{name}.py", *data, "--encoder", args.encoder, *arguments]


def steps_of(args: argparse.Namespace, number: int) -> int:
    """Scale a number of steps."""
    return max(round(number * args.scale), 2)


def race(args: argparse.Namespace, model: str, number: int, size: int, **options: Any) -> Job:
    """Train and score one model for so many steps of 16."""
    steps, name = steps_of(args, number), f"{model}-{number}-{size}px"
    return Job(name, script(
        "compare", args, "--models", model, "--steps", steps, "--score-every", max(steps // args.points, 1),
        "--image-size", size, "--batch-size", 16, "--preload", "--workers", args.workers, "--precision", "bf16-mixed",
        "--feature-cache", "device" if args.on_gpu else "ram", "--arguments", json.dumps({model: options}),
        "--output", args.scratch / name,
    ))  # fmt: skip


def experiment(args: argparse.Namespace, name: str, steps: int, seeds: Sequence[int], *settings: str) -> Job:
    """Train and score DecAD with some settings, for so many steps of 8."""
    chosen = [name for name in ("screw", "toothbrush") if name in args.categories]
    points = sorted({0, *(steps_of(args, number) for number in (100, 300, 1000, 5000) if number <= steps)})
    return Job(f"{name}-{steps}-seeds-{'-'.join(map(str, seeds))}", script(
        "experiments", args, "--steps", steps_of(args, steps), "--score-at", *points, "--seeds", *seeds,
        "--name", f"{name}-{steps}", "--accelerator", args.accelerator, "--features", args.scratch / "features",
        "--log", args.output / "experiments.jsonl", "--workers", args.workers,
        *(["--choose", *chosen] if chosen else []), *(["--set", *settings] if settings else []),
    ))  # fmt: skip


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """List the races and experiments, the longest and the most wanted first."""
    first, seeds = args.seeds[:1], args.seeds
    plain, paper = ("decouple=false",), ("loss.normal_weight=1.0", "loss.abnormal_weight=1.0")
    anomalies = "decoupler.num_prototypes=0", "synthesis.fraction=0.5"
    gaussian = (*anomalies, "synthesis.noise=gaussian", "synthesis.num_steps=0")
    jobs = {
        "race": [
            race(args, "Dinomaly", 5_000, 280),
            race(args, "DecAD", 15_000, 280),
            race(args, "DecAD", 5_000, 280),
            race(args, "DecAD", 5_000, 392),
            race(args, "Dinomaly", 5_000, 392),
        ],
        "experiments": [
            experiment(args, "decoupled", 1000, seeds),
            experiment(args, "plain", 1000, seeds, *plain),
            experiment(args, "gaussian", 1000, seeds, *gaussian),
            experiment(args, "decoupled", 5000, first),
            experiment(args, "plain", 5000, first, *plain),
            experiment(args, "adversarial", 1000, seeds, *anomalies),
            *(
                experiment(args, f"delta-{delta}", 1000, first, *anomalies, f"delta={delta}")
                for delta in (1.0, 1.5, 2.0, 3.0)
            ),
            *(
                experiment(args, f"latent-{share}", 1000, first, f"decoupler.abnormal_fraction={share}")
                for share in (0.8, 0.95, 0.97)
            ),
            experiment(args, "paper-losses", 1000, first, *anomalies, *paper),
            experiment(args, "random-differences", 1000, seeds, *anomalies, "synthesis.num_steps=0"),
            *(experiment(args, f"rate-{rate}", 1000, first, f"learning_rate={rate}") for rate in (3e-4, 3e-3)),
            *(experiment(args, f"depth-{depth}", 1000, first, f"decoder_depth={depth}") for depth in (1, 3)),
            *(experiment(args, "decoupled", 5000, [seed]) for seed in seeds[1:]),
            *(experiment(args, "plain", 5000, [seed], *plain) for seed in seeds[1:]),
        ],
    }
    wanted = [jobs[phase] for phase in ("race", "experiments") if phase in args.phases]
    pairs = itertools.zip_longest(*wanted)
    return [job for pair in pairs for job in pair if job is not None]


def run(args: argparse.Namespace, jobs: list[Job], lanes: int, threads: int) -> None:
    """Run jobs in their order, so many beside each other, until the time is over."""
    waiting, running = list(jobs), []
    while (waiting or running) and time.monotonic() < args.deadline:
        while waiting and len(running) < lanes:
            job = waiting.pop(0)
            job.start(args.scratch, threads)
            running.append(job)
            print(f"{time.strftime('%H:%M:%S')} {job.name}", flush=True)
        time.sleep(0.5)
        for job in [job for job in running if job.is_over()]:
            running.remove(job)
            code = job.process.returncode if job.process else 0
            print(f"{time.strftime('%H:%M:%S')} {job.name}: {'done' if not code else f'failed ({code})'}", flush=True)
        collect(args)
    for job in running:
        job.stop()
        print(f"{job.name}: cut off", flush=True)
    collect(args)


def collect(args: argparse.Namespace) -> None:
    """Bring the curves and the ends of the logs together."""
    lines = []
    for file in sorted(args.scratch.glob("*/runs/*/curve.jsonl")):
        facts = {"race": file.parents[2].name, "run": file.parent.name}
        lines += [json.dumps({**facts, **json.loads(line)}) + "\n" for line in file.read_text().splitlines()]
    (args.output / "races.jsonl").write_text("".join(lines))
    logs = [*args.scratch.glob("*.log"), *args.scratch.glob("*/runs/*.log")]
    ends = [f"== {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:]) for log in logs]
    (args.output / "logs.txt").write_text("\n".join(ends))


def main() -> None:
    """Run the phases."""
    args = parse()
    speed = ["--accelerator", args.accelerator, "--log", args.output / "throughput.jsonl", "--encoder", args.encoder]
    if args.scale < 1:
        speed += ["--steps", steps_of(args, 30), "--seconds", 0.5 * args.scale, "--train-batches", 2, "--batches", 1]
    alone = {
        "tests": Job("tests", ["-m", "pytest", "-q", "-p", "no:cacheprovider", *args.tests]),
        "speed": Job("speed", [_FOLDER / "throughput.py", *speed]),
    }
    for phase, job in alone.items():
        if phase in args.phases:
            run(args, [job], 1, os.cpu_count() or 1)
    if "experiments" in args.phases:
        # Encoded once, before all ask for them.
        run(args, [experiment(args, "features", 2, args.seeds[:1])], 1, os.cpu_count() or 1)
    run(args, jobs_of(args), args.lanes, max((os.cpu_count() or 1) // args.lanes, 1))
    print(f"written to {args.output}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in MVTec AD's layout")
    parser.add_argument("--categories", nargs="+", help="default: all that are in the folder")
    parser.add_argument("--encoder", default="vit_small_patch14_dinov2")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--scratch", type=Path, help="folder of features and checkpoints; default: in --output")
    parser.add_argument("--phases", nargs="+", default=["tests", "speed", "race", "experiments"])
    parser.add_argument("--tests", nargs="+", default=[str(_FOLDER.parent / "tests" / "test_devices.py")])
    parser.add_argument("--minutes", type=float, default=8, help="when to stop")
    parser.add_argument("--lanes", type=int, default=6, help="processes of races and experiments beside each other")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 12), help="processes that read images")
    parser.add_argument("--accelerator", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--points", type=int, default=5, help="of each curve")
    parser.add_argument("--scale", type=float, default=1, help="factor of all numbers of steps, to try it")
    args = parser.parse_args()
    common.check_data(args)
    args.output.mkdir(parents=True, exist_ok=True)
    args.scratch = args.scratch or args.output / "scratch"
    args.scratch.mkdir(parents=True, exist_ok=True)
    args.on_gpu = args.accelerator == "gpu"
    args.deadline = time.monotonic() + 60 * args.minutes
    return args


if __name__ == "__main__":
    main()
