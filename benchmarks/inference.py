# SPDX-License-Identifier: Apache-2.0
"""Speed of DecAD and its peers from anomalib as torch, ONNX and OpenVINO, and of DecAD's parts.

usage: python benchmarks/inference.py [--models DecAD Dinomaly Patchcore] [--formats torch onnx ...] [--batches 1 8]

All models get the same encoder and image size, images come ready in that size. Each measurement is a process of its
own, all of them run in turn, and that several times: the table has medians. Weights other than the encoder's do not
matter for speed and stay random unless --checkpoint gives trained ones for DecAD; PatchCore's memory bank holds
--memory-bank patches. openvino-int8 needs --data, images to calibrate with.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

FORMATS = ("torch", "onnx", "openvino", "openvino-default", "openvino-int8")
_OPENVINO_OPTIONS = {"INFERENCE_PRECISION_HINT": "f32"}
_WARM_UP_SECONDS = 2.0


def export(args: argparse.Namespace, name: str, kind: str, folder: Path) -> Path:
    """Export a model in a format; ``openvino-default`` shares the file of ``openvino``."""
    import torch
    from anomalib.deploy import CompressionType

    import peers
    from anomalib_decad import DecAD

    torch.manual_seed(0)
    if name == "DecAD" and args.checkpoint:
        model: Any = DecAD.load_from_checkpoint(args.checkpoint)
    else:
        model = peers.create(name, args.encoder, args.image_size)
        if name == "DecAD":
            peers.prepare(model.model, torch.rand(4, 3, args.image_size, args.image_size))
    model.eval()
    if name == "Patchcore":
        model.model.memory_bank = torch.randn(args.memory_bank, sum(model.model.feature_extractor.out_dims))
    size = (args.image_size, args.image_size)
    if kind == "torch":
        return model.to_torch(folder)
    if kind == "onnx":
        return model.to_onnx(folder, input_size=size)
    compression = CompressionType.INT8_PTQ if kind == "openvino-int8" else None
    data = None
    if compression:
        common.check_data(args)
        data = common.datamodule(args, eval_batch_size=1)
    return model.to_openvino(folder, input_size=size, compression_type=compression, datamodule=data)


def load(path: Path, kind: str) -> Callable[[Any], Any]:
    """Load an exported model as a function of a float32 array of shape (B, 3, H, W)."""
    if kind == "torch":
        import torch

        model = torch.load(path, weights_only=False)["model"].eval()

        def run(batch: Any) -> Any:
            with torch.inference_mode():
                return model(torch.from_numpy(batch))

        return run
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda batch: session.run(None, {session.get_inputs()[0].name: batch})
    import openvino

    config = {} if kind == "openvino-default" else _OPENVINO_OPTIONS
    compiled = openvino.Core().compile_model(str(path), "CPU", config)
    return lambda batch: compiled([batch])


def measure(path: Path, kind: str, batches: list[int], size: int, seconds: float) -> dict[str, float]:
    """Count images a second for each batch size, and the peak memory of this process in MiB."""
    import numpy as np

    model = load(path, kind)
    result = {}
    for batch_size in batches:
        batch = np.random.default_rng(0).random((batch_size, 3, size, size), dtype=np.float32)
        start = time.perf_counter()
        while time.perf_counter() < start + _WARM_UP_SECONDS:
            model(batch)
        count, start = 0, time.perf_counter()
        while time.perf_counter() < start + seconds:
            model(batch)
            count += batch_size
        result[f"batch {batch_size}"] = count / (time.perf_counter() - start)
    result["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result


def measure_parts(args: argparse.Namespace) -> dict[str, float]:
    """Measure the time of DecAD's parts in torch, in milliseconds an image, medians of 15 batches of 8."""
    import torch

    import peers
    from anomalib_decad import DecAD

    size, batch_size = args.image_size, 8
    model = DecAD.load_from_checkpoint(args.checkpoint) if args.checkpoint else None
    if model is None:
        model = DecAD(encoder=args.encoder, image_size=(size, size))
        peers.prepare(model.model, torch.rand(4, 3, size, size))
    net: Any = model.eval().model.fused((size, size))
    grid = net.encoder.grid(size, size)
    with torch.inference_mode():
        images = torch.randn(batch_size, 3, size, size)
        outputs = net.encoder(images)
        features = net.standardizer(outputs)
        x = net.fusion(outputs)
        latent, (_, normal) = net.decoupler.network(x), net.decoupler.split(x)
        _, product = net.recognizer.nearest(net.recognizer.describe(outputs))
        clean, energy = net.decoupler(x, product)
        reconstructions = net.decoder(clean)
        parts: dict[str, Callable[[], Any]] = {
            "encoder": lambda: net.encoder(images),
            "standardization and fusion": lambda: (net.standardizer(outputs), net.fusion(outputs)),
            "network, forward": lambda: net.decoupler.network(x),
            "network, inverse": lambda: net.decoupler.network.inverse(latent),
            "prototypes": lambda: net.decoupler.prior(normal, product),
            "decoder": lambda: net.decoder(clean),
            "anomaly map and score": lambda: net.anomaly_map_generator(
                features, reconstructions, grid, (size, size), energy
            ),
            "all": lambda: net(images),
        }
        times: dict[str, list[float]] = {part: [] for part in parts}
        for _ in range(17):
            for part, function in parts.items():
                start = time.perf_counter()
                function()
                times[part].append((time.perf_counter() - start) / batch_size * 1000)
    return {part: statistics.median(values[2:]) for part, values in times.items()}


def work(args: argparse.Namespace) -> None:
    """Do the task of a worker."""
    task, *rest = args.worker
    answer: dict[str, Any]
    if task == "export":
        name, kind = rest
        path = export(args, name, kind, args.folder / name / kind)
        answer = {"path": str(path)}
    elif task == "measure":
        kind, path = rest
        answer = measure(Path(path), kind, args.batches, args.image_size, args.seconds)
    else:
        answer = measure_parts(args)
    common.tell(answer)


def file_size(path: Path) -> float:
    """Add up an exported model's files, in MB."""
    return sum(file.stat().st_size for file in path.parent.glob(path.stem + ".*")) / 1e6


def main() -> None:
    """Export, measure, and print Markdown tables."""
    args = parse()
    if args.worker:
        work(args)
        return
    paths: dict[tuple[str, str], Path] = {}
    errors: dict[tuple[str, str], str] = {}
    for name in args.models:
        for kind in args.formats:
            if kind == "openvino-default" and (name, "openvino") in paths:
                paths[name, kind] = paths[name, "openvino"]
                continue
            answer = common.ask_worker(__file__, [*args.command_line, "--worker", "export", name, kind])
            if "error" in answer:
                errors[name, kind] = answer["error"]
            else:
                paths[name, kind] = Path(answer["path"])
            print(f"exported {name} {kind}: {answer}", file=sys.stderr, flush=True)
    results: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in paths}
    for _ in range(args.rounds):
        for (name, kind), path in paths.items():
            answer = common.ask_worker(__file__, [*args.command_line, "--worker", "measure", kind, str(path)])
            print(f"{name} {kind}: {answer}", file=sys.stderr, flush=True)
            if "error" in answer:
                errors[name, kind] = answer["error"]
            else:
                results[name, kind].append(answer)
    parts = {}
    if "DecAD" in args.models:
        parts = common.ask_worker(__file__, [*args.command_line, "--worker", "parts"])
    print(report(args, paths, results, errors, parts))


def report(
    args: argparse.Namespace,
    paths: dict[tuple[str, str], Path],
    results: dict[tuple[str, str], list[dict[str, float]]],
    errors: dict[tuple[str, str], str],
    parts: dict[str, float],
) -> str:
    """Format the results as Markdown."""
    columns = [f"batch {batch}" for batch in args.batches]
    lines = [
        f"`python benchmarks/inference.py {' '.join(args.command_line)}`: {args.encoder}, {args.image_size} pixels, "
        f"{os.cpu_count()} CPUs ({common.cpu_name()}), medians of {args.rounds} rounds of {args.seconds:g} s.",
        "",
        "| model | format | " + " | ".join(f"images/s, {column}" for column in columns) + " | peak MiB | file MB |",
        "|---" * (4 + len(columns)) + "|",
    ]
    for (name, kind), rows in results.items():
        if rows:
            speeds = [f"{statistics.median(row[column] for row in rows):.1f}" for column in columns]
            peak = statistics.median(row["peak MiB"] for row in rows)
            size = file_size(paths[name, kind])
            lines.append(f"| {name} | {kind} | " + " | ".join(speeds) + f" | {peak:.0f} | {size:.0f} |")
    lines += [f"\n{name} as {kind} failed: `{error}`" for (name, kind), error in errors.items()]
    if parts and "error" not in parts:
        lines += ["", "| DecAD in torch, batch 8 | ms an image | of the encoder |", "|---|---|---|"]
        lines += [f"| {part} | {ms:.2f} | {ms / parts['encoder']:.0%} |" for part, ms in parts.items()]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = common.argument_parser(__doc__, data_required=False)
    parser.add_argument("--models", nargs="+", default=["DecAD", "Dinomaly", "Patchcore"], help="names in peers.py")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS[:4]), choices=FORMATS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--checkpoint", type=Path, help="a trained DecAD with that encoder")
    parser.add_argument("--memory-bank", type=int, default=10_000, help="patches that PatchCore keeps")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-exports"), help="where exports go")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    command_line = sys.argv[1:]
    args = parser.parse_args()
    args.command_line = command_line[: command_line.index("--worker")] if args.worker else command_line
    return args


if __name__ == "__main__":
    main()
