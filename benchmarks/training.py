# SPDX-License-Identifier: Apache-2.0
"""A training step with and without the feature cache: time, losses, peak memory.

usage: python benchmarks/training.py --data ROOT --categories bottle [--steps 20] [--precision bf16-mixed]
                                     [--modes off ram disk]

ROOT is a folder in MVTec AD's layout. Each mode is a process of its own; all get the same seed, so that the losses of
each step can be compared.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import sys
import tempfile
import time
from typing import Any

from lightning.pytorch import Callback

import common

MODES = ("off", "ram", "disk")
_WARM_UP = 3


class Recorder(Callback):
    """Keeps the loss of each step, and the time from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ends: list[float] = []

    def on_train_batch_end(self, _trainer: Any, _module: Any, outputs: Any, *_: Any) -> None:
        """Note a step."""
        self.losses.append(float(outputs["loss"]))
        self.ends.append(time.perf_counter())

    def durations(self) -> list[float]:
        """Compute the seconds of each step but the first, which starts before it."""
        return [after - before for before, after in itertools.pairwise(self.ends)]


def run(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Train in this process."""
    from anomalib.engine import Engine
    from lightning.pytorch import seed_everything

    from anomalib_decad import DecAD

    seed_everything(0)
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        size = (args.image_size, args.image_size)
        model = DecAD(args.encoder, image_size=size, feature_cache=mode, feature_cache_dir=folder, max_steps=args.steps)
        data = common.datamodule(args)
        engine = Engine(
            max_steps=args.steps,
            limit_val_batches=0,
            logger=False,
            callbacks=[recorder],
            default_root_dir=folder,
            enable_progress_bar=False,
            precision=args.precision,
        )
        start = time.perf_counter()
        engine.fit(model, datamodule=data)
    return {
        "before the first step, s": recorder.ends[0] - start,
        "step, s": statistics.median(recorder.durations()[_WARM_UP:]),
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": recorder.losses,
    }


def main() -> None:
    """Train in each mode and print a Markdown table."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", default="32-true", help="of Lightning's trainer")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES, help="the first is compared with")
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    common.check_data(args)
    if args.worker:
        common.tell(run(args, args.worker))
        return
    results: dict[str, dict[str, Any]] = {}
    for mode in args.modes:
        results[mode] = common.ask_worker(__file__, [*sys.argv[1:], "--worker", mode])
        if "error" in results[mode]:
            raise SystemExit(f"{mode}: {results[mode]['error']}")
    reference = results[args.modes[0]]
    print("| feature cache | step, s | faster | before the first step, s | peak MiB | largest change of a loss |")
    print("|---" * 6 + "|")
    for mode, result in results.items():
        pairs = zip(result["losses"], reference["losses"], strict=True)
        change = max(abs(loss - expected) / expected for loss, expected in pairs)
        print(
            f"| {mode} | {result['step, s']:.2f} | {reference['step, s'] / result['step, s']:.2f} "
            f"| {result['before the first step, s']:.0f} | {result['peak MiB']:.0f} | {change:.1e} |"
        )


if __name__ == "__main__":
    main()
