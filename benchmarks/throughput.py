# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of training and inference on a GPU: DecAD beside Dinomaly with the same encoder.

usage: python benchmarks/throughput.py [--accelerator gpu] [--models DecAD Dinomaly] [--batches 1 8 64] [--log FILE]

Images are random and on the device, in the size that the encoder sees. A line of JSON is written for each measurement
as soon as it is there. ``share`` is that of the multiply-adds, counted, in the peak of --peak-tflops.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

import common
import peers
from anomalib_decad.feature_cache import FeatureBatch, FeatureCode
from count import multiply_adds

_WARM_UP = 12


class StepTimer(Callback):
    """Measures the time of a step, from the end of the warm-up to the last one."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.seconds = float("nan")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Start after the warm-up, and stop at the end."""
        step = trainer.global_step
        if step not in {self.warm_up, trainer.max_steps}:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        if step == self.warm_up:
            self.start = time.perf_counter()
        else:
            self.seconds = (time.perf_counter() - self.start) / (step - self.warm_up)


def batches(args: argparse.Namespace, batch_size: int, features: tuple[int, int] | None) -> DataLoader:
    """Give a loader of random batches on the device, of images or of the features of (layers, channels)."""
    device, size = common.device_of(args), args.image_size
    if features is None:
        images = torch.rand(batch_size, 3, size, size, device=device)
        batch: Any = ImageBatch(image=images, gt_label=torch.zeros(batch_size, dtype=torch.bool))
    else:
        layers, dim = features
        side = size // 14
        codes = torch.randn(batch_size, layers, side * side, dim, dtype=torch.float16, device=device)
        ones = torch.ones(layers, 1, dim, device=device)
        batch = FeatureBatch(codes, FeatureCode(0 * ones, ones), (side, side))
    return DataLoader(range(10**6), batch_size=1, collate_fn=lambda _: batch)


def train(args: argparse.Namespace, name: str, batch_size: int, cached: bool) -> dict[str, float]:
    """Measure training steps through Lightning's trainer: with optimizer, clipping and logging."""
    seed_everything(0, verbose=False)
    model = peers.create(name, args.encoder, args.image_size, evaluator=False, visualizer=False)
    features = (len(model.model.encoder.layers), model.model.encoder.dim) if cached else None
    timer = StepTimer(_WARM_UP)
    forget_memory(args)
    trainer = Trainer(
        max_steps=_WARM_UP + args.steps, accelerator=args.accelerator, precision=args.precision, logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, callbacks=[timer],
    )  # fmt: skip
    trainer.fit(model, batches(args, batch_size, features))
    return {"step_ms": 1000 * timer.seconds, "images_per_second": batch_size / timer.seconds, **memory(args)}


def forget_memory(args: argparse.Namespace) -> None:
    """Free what earlier measurements have left, and measure the peak from here on."""
    gc.collect()
    if args.accelerator == "gpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(args: argparse.Namespace) -> dict[str, float]:
    """Give the peak of the device's memory in MiB, where it is counted."""
    return {"peak_MiB": torch.cuda.max_memory_allocated() / 2**20} if args.accelerator == "gpu" else {}


def infer(args: argparse.Namespace, name: str, batch_size: int, precision: str, how: str) -> dict[str, float]:
    """Measure inference: the model as it is exported, compiled, or recorded as a CUDA graph."""
    device, size = common.device_of(args), args.image_size
    net, adds = network(name, args.encoder, size, device)
    forget_memory(args)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    images = torch.rand(batch_size, 3, size, size, device=device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        run: Callable[[], Any] = lambda: net(images)  # noqa: E731
        if how == "compiled":
            compiled = torch.compile(net, dynamic=False)
            run = lambda: compiled(images)  # noqa: E731
        elif how == "graph":
            run = recorded(run)
        seconds = time_of(run, args.seconds, device)
    rate = batch_size / seconds
    return {
        "ms": 1000 * seconds,
        "images_per_second": rate,
        "share": 2 * adds * rate / (args.peak_tflops * 1e12),
        **memory(args),
    }


@functools.lru_cache(maxsize=1)  # another one would count as memory of this one
def network(name: str, encoder: str, size: int, device: torch.device) -> tuple[Any, int]:
    """Create a model as it is exported, on the device, and count its multiply-adds for an image."""
    seed_everything(0, verbose=False)
    model = peers.create(name, encoder, size)
    if name == "DecAD":
        peers.prepare(model.model, torch.rand(4, 3, size, size))
    model.eval()
    net: Any = model.model.fused((size, size)) if name == "DecAD" else model.model
    net = net.requires_grad_(False)
    with torch.inference_mode():
        adds = multiply_adds(lambda: net(torch.rand(1, 3, size, size)))
    return net.to(device), adds


def recorded(run: Callable[[], Any]) -> Callable[[], Any]:
    """Record a function as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def time_of(run: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Compute the seconds of a call, by as many calls as fit a time."""

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(3):
        run()
    start = wait()
    run()
    count = max(int(seconds / (wait() - start)), 1)
    start = wait()
    for _ in range(count):
        run()
    return (wait() - start) / count


Measurement = tuple[dict[str, Any], Callable[[], dict[str, float]]]


def trainings(args: argparse.Namespace) -> Iterator[Measurement]:
    """List the measurements of training, the most wanted first."""
    for batch_size in args.train_batches:
        for name in args.models:
            for kind in ("features", "images") if name == "DecAD" else ("images",):
                facts = {"what": "training", "model": name, "input": kind, "batch": batch_size}
                measure = functools.partial(train, args, name, batch_size, kind == "features")
                yield {**facts, "precision": args.precision}, measure


def inferences(args: argparse.Namespace) -> Iterator[Measurement]:
    """List the measurements of inference, the most wanted first."""
    on_gpu = args.accelerator == "gpu"
    precisions = ("fp32", "tf32", "bf16") if on_gpu else ("fp32",)
    kinds = list(itertools.product(["eager", "graph"] if on_gpu else ["eager"], precisions, args.batches))
    if args.compile:
        kinds.append(("compiled", precisions[-1], max(args.batches)))  # minutes each
    for (how, precision, batch_size), name in itertools.product(kinds, args.models):
        facts = {"what": "inference", "model": name, "how": how, "batch": batch_size, "precision": precision}
        yield facts, functools.partial(infer, args, name, batch_size, precision, how)


def print_tables(lines: list[dict[str, Any]], models: list[str]) -> None:
    """Write the measurements as Markdown: a row for each kind, and the models beside each other."""
    for what, keys, value, unit in (
        ("training", ("input", "batch"), "step_ms", "ms a step"),
        ("inference", ("how", "precision", "batch"), "images_per_second", "images/s"),
    ):
        rows: dict[tuple[Any, ...], dict[str, str]] = {}
        for line in lines:
            if line["what"] == what:
                cell = f"{line[value]:.1f}" if value in line else "failed"
                rows.setdefault(tuple(line[key] for key in keys), {})[line["model"]] = cell
        print(f"\n| {' | '.join(keys)} | {' | '.join(f'{model}, {unit}' for model in models)} |")
        print("|---" * (len(keys) + len(models)) + "|")
        for row, cells in rows.items():
            print(f"| {' | '.join(map(str, row))} | {' | '.join(cells.get(model, '') for model in models)} |")


def main() -> None:
    """Measure all, and go on where one fails."""
    parser = common.argument_parser(__doc__, data_required=False)
    parser.add_argument("--models", nargs="+", default=["DecAD", "Dinomaly"])
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="gpu")
    parser.add_argument("--precision", default="bf16-mixed", help="of training")
    parser.add_argument("--steps", type=int, default=30, help="training steps that are timed")
    parser.add_argument("--train-batches", type=int, nargs="*", default=[16, 8])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64], help="of inference")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement of inference")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, which takes minutes")
    parser.add_argument("--peak-tflops", type=float, default=989, help="of the device, an H100's in bfloat16")
    parser.add_argument("--log", type=Path, default=Path("results/throughput.jsonl"))
    args = parser.parse_args()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    machine, lines = common.machine(), []
    for facts, measure in itertools.chain(trainings(args), inferences(args)):
        try:
            result: dict[str, Any] = {key: round(value, 4) for key, value in measure().items()}
        except Exception as error:  # the others are still wanted
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        lines.append({**facts, **result})
        print(json.dumps(lines[-1]), flush=True)
        with args.log.open("a") as log:
            log.write(
                json.dumps({**facts, **result, "encoder": args.encoder, "image_size": args.image_size, **machine})
                + "\n"
            )
    print_tables(lines, args.models)


if __name__ == "__main__":
    main()
