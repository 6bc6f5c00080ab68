# SPDX-License-Identifier: Apache-2.0
"""A race: train and score DecAD and peers from anomalib on the same images, with the same encoder, size and budget.

usage: python benchmarks/compare.py --data ROOT [--categories a b] [--models DecAD Dinomaly ...] [--steps 300 ...]
                                    [--minutes 10 ...] [--output results/race]

ROOT is a folder in MVTec AD's layout; one model is trained for all of its categories. Every run is a process of its
own, one after the other. --steps gives methods that are trained in steps equal numbers of them; --minutes gives them
equal training times, by the time of a step that a short run measures first. Memory banks are filled once.
Written to --output after each run: results.csv, results.md, results.png (accuracy against training time) and the log of
each run; runs that are there are not repeated, and those of other settings are refused. With --score-every, the metrics
of each category on the way are lines of runs/<run>/curve.jsonl and a second table of results.md, and a run that was cut
off goes on from its last one.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import common
import peers

MEMORY_BANKS = {"Patchcore", "Rad", "AnomalyDINO", "NearestNeighbor"}
_PROBE_STEPS = 20
#: Arguments that results depend on.
_SETTINGS = (
    "categories", "encoder", "image_size", "batch_size", "coreset_ratio", "sampling", "precision", "feature_cache",
    "preload",
)  # fmt: skip
_COLUMNS = (
    "model", "budget", "steps", "image_AUROC", "image_AP", "image_F1Max", "pixel_AUROC", "pixel_AP", "pixel_F1Max",
    "pixel_AUPRO", "mAD", "training_seconds", "images_per_second", "peak_MiB", "learnable_parameters",
    "multiply_adds",
)  # fmt: skip


def run(args: argparse.Namespace, name: str, steps: int | None) -> dict[str, Any]:
    """Train and score one model in this process."""
    import torch
    from anomalib.engine import Engine
    from lightning.pytorch import seed_everything

    from anomalib_decad.metrics import METRICS, CategoryEvaluator
    from count import multiply_adds
    from curve import Curve, preload
    from throughput import time_of
    from training import Recorder

    seed_everything(args.seed)
    options: dict[str, Any] = json.loads(args.arguments).get(name, {})
    if name == "Patchcore":
        options.setdefault("coreset_sampling_ratio", args.coreset_ratio)
    if name == "AnomalyDINO":
        options.setdefault("coreset_subsampling", True)
        options.setdefault("sampling_ratio", args.coreset_ratio)
    if name == "DecAD":
        options.setdefault("feature_cache", args.feature_cache)
    evaluator = CategoryEvaluator()
    model = peers.create(name, args.encoder, args.image_size, evaluator=evaluator, visualizer=False, **options)
    datamodule = common.datamodule(args, sampling=args.sampling)
    if args.preload:
        preload(datamodule, args.image_size, args.workers)
    recorder = Recorder()
    curve = None
    if args.score_every and steps and not args.probe:
        curve = Curve(args.output / "runs" / f"{name}-{steps}-seed{args.seed}", args.score_every)
    engine = Engine(
        default_root_dir=args.output / "runs" / f"{name}-{steps}",
        callbacks=[recorder] if args.probe else [curve] if curve else [],
        logger=False,
        enable_progress_bar=args.progress,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        precision="32-true" if name in MEMORY_BANKS else args.precision,
        **({"max_steps": steps} if steps else {"max_epochs": 1}),
    )
    start = time.perf_counter()
    engine.fit(model, datamodule=datamodule, ckpt_path=curve.resume_from if curve else None)
    seconds = time.perf_counter() - start
    if args.probe:
        return {"first_step_seconds": recorder.ends[0] - start, "step_seconds": statistics.median(recorder.durations())}
    result: dict[str, Any] = {"training_seconds": seconds}
    if curve:
        result |= {"training_seconds": curve.seconds, **curve.points[-1]["metrics"]["mean"], "curve": curve.points}
    else:
        (scores,) = engine.test(model, datamodule=datamodule)
        result |= {metric: float(scores[metric]) for metric in (*METRICS, "mAD")}

    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=model.device)
    with torch.inference_mode():
        result["images_per_second"] = len(images) / time_of(lambda: model.model(images), 5, model.device)
    # Memory banks leave their frozen encoder's parameters with requires_grad, but learn none.
    learnable = [] if name in MEMORY_BANKS else [p for p in model.parameters() if p.requires_grad]
    result["learnable_parameters"] = sum(parameter.numel() for parameter in learnable)
    model.requires_grad_(False)
    result["multiply_adds"] = multiply_adds(lambda: model.model(images[:1]))
    result["peak_MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result


def start(args: argparse.Namespace, name: str, steps: int | None, probe: bool = False) -> dict[str, Any] | None:
    """Run a model in a process of its own; its log and result stay in the output folder."""
    folder = args.output / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{'probe-' if probe else ''}{steps or 'once'}-seed{args.seed}"
    result = folder / f"{stem}.json"
    check_settings(args, name, folder / f"{stem}.settings.json")
    if result.is_file():
        return json.loads(result.read_text())
    print(f"{time.strftime('%H:%M:%S')} {stem}", flush=True)
    command = [sys.executable, __file__, *args.command_line, "--worker", name, str(steps or 0), str(result)]
    if probe:
        command.append("probe")
    with (folder / f"{stem}.log").open("w") as log:
        code = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        ).returncode
    if code:
        print(f"    failed, see {folder / f'{stem}.log'}", flush=True)
        return None
    return json.loads(result.read_text())


def check_settings(args: argparse.Namespace, name: str, file: Path) -> None:
    """Note the settings of a run, or end with one line where those of a run that is there are others.

    Args:
        args (argparse.Namespace): Command line.
        name (str): Name of the model.
        file (Path): Where the settings are noted.
    """
    settings = {key: getattr(args, key) for key in _SETTINGS}
    settings |= {"data": str(args.data.resolve()), "arguments": json.loads(args.arguments).get(name, {})}
    known = json.loads(file.read_text()) if file.is_file() else settings
    different = [key for key, value in settings.items() if known.get(key) != value]
    if different:
        raise SystemExit(
            f"--output: {file.parent} has a run of {name} with "
            f"{', '.join(f'{key} {known.get(key)} instead of {settings[key]}' for key in different)}: "
            "give another folder"
        )
    file.write_text(json.dumps(settings))


def main() -> None:
    """Run all models with all budgets."""
    args = parse()
    if args.worker:
        name, steps, path, *probe = args.worker
        args.probe = bool(probe)
        values = {
            **run(args, name, int(steps) or None),
            "machine": ", ".join(" ".join(fact) for fact in common.machine().items()),
        }
        partial = Path(path + ".partial")
        partial.write_text(json.dumps(values))
        partial.replace(path)
        return
    rows: list[dict[str, Any]] = []
    for name in args.models:
        if name in MEMORY_BANKS:
            budgets: list[tuple[str, int | None]] = [("memory bank", None)]
        else:
            budgets = [(f"{steps} steps", steps) for steps in args.steps]
            for minutes in args.minutes:
                steps = steps_in(args, name, minutes)
                budgets += [(f"{minutes:g} min", steps)] if steps else []
        for label, steps in budgets:
            result = start(args, name, steps)
            if result is not None:
                rows.append({"model": name, "budget": label, "steps": steps or "", **result})
                write(args, rows)
    print((args.output / "results.md").read_text() if rows else "nothing ran")


def steps_in(args: argparse.Namespace, name: str, minutes: float) -> int | None:
    """Find how many steps a model can do in a time, by a short run; ``None`` if that fails."""
    probe = start(args, name, _PROBE_STEPS, probe=True)
    if probe is None:
        return None
    return max(1 + int((minutes * 60 - probe["first_step_seconds"]) / probe["step_seconds"]), 1)


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the results so far as CSV, Markdown and a plot."""
    with (args.output / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        f"`python benchmarks/compare.py {shlex.join(args.command_line)}`",
        "",
        # Results that were there may be of another machine.
        *dict.fromkeys(row.get("machine", "a machine that was not noted") for row in rows),
        "",
        _line(column.replace("_", " ") for column in _COLUMNS),
        "|---" * len(_COLUMNS) + "|",
        *(_line(_format(column, row[column]) for column in _COLUMNS) for row in rows),
    ]
    (args.output / "results.md").write_text("\n".join([*lines, *on_the_way(rows)]) + "\n")
    plot(args, rows)


def on_the_way(rows: list[dict[str, Any]]) -> list[str]:
    """Write mAD of each category at the points of the curves, as Markdown."""
    points = [(row["model"], row["budget"], point) for row in rows for point in row.get("curve", ())]
    if not points:
        return []
    categories = [name for name in points[0][2]["metrics"] if name != "mean"]
    columns = ("model", "budget", "step", "training seconds", "mAD", *categories)
    lines = ["", _line(columns), "|---" * len(columns) + "|"]
    for model, budget, point in points:
        values = (100 * point["metrics"][name]["mAD"] for name in ("mean", *categories))
        facts = (model, budget, str(point["step"]), f"{point['training_seconds']:.0f}")
        lines.append(_line((*facts, *(f"{value:.1f}" for value in values))))
    return lines


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _format(column: str, value: Any) -> str:
    if column in {"learnable_parameters", "multiply_adds"}:
        return f"{value / 1e6:.2f} M" if column.startswith("learn") else f"{value / 1e9:.2f} G"
    if column in {"training_seconds", "peak_MiB"}:
        return f"{value:.0f}"
    if column == "images_per_second":
        return f"{value:.1f}"
    return f"{100 * value:.1f}" if isinstance(value, float) else str(value)


def plot(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Draw accuracy against training time, and where there are curves, against steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    has_curves = any("curve" in row for row in rows)
    figure, all_axes = plt.subplots(
        1, 1 + has_curves, figsize=(10 if has_curves else 7, 4.5), layout="constrained", sharey=True, squeeze=False
    )
    over_time, *over_steps = all_axes[0]
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        points = sorted((row["training_seconds"] / 60, 100 * row["mAD"]) for row in mine if "curve" not in row)
        if points:
            over_time.plot(*zip(*points, strict=True), marker="o", label=name)
        for row in mine:
            if "curve" not in row:
                continue
            curve, label = row["curve"], f"{name}, {row['budget']}"
            values = [100 * point["metrics"]["mean"]["mAD"] for point in curve]
            over_time.plot([point["training_seconds"] / 60 for point in curve], values, marker=".", label=label)
            over_steps[0].plot([point["step"] for point in curve], values, marker=".", label=label)
    over_time.set(xlabel="training time in minutes", ylabel="mean of the seven metrics in %")
    if not has_curves:
        over_time.set_xscale("log")
    for axes in over_steps:
        axes.set_xlabel("steps")
    for axes in all_axes[0]:
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(args.output / "results.png", dpi=120)
    plt.close(figure)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(peers.MODELS), choices=[*peers.MODELS, *peers.DECOUPLED])
    parser.add_argument("--steps", type=int, nargs="*", default=[300], help="training steps, for each a run")
    parser.add_argument("--minutes", type=float, nargs="*", default=[], help="training minutes, for each a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coreset-ratio", type=float, default=0.01, help="share of patches that memory banks keep")
    parser.add_argument("--sampling", default="auto", choices=["auto", "natural"], help="of MultiCategory")
    parser.add_argument(
        "--precision", default="32-true", help="of Lightning's trainer, for methods that are trained in steps"
    )
    parser.add_argument("--feature-cache", default="ram", choices=["off", "ram", "device", "disk"], help="of DecAD")
    parser.add_argument("--score-every", type=int, default=0, help="also score on the way, every so many steps")
    parser.add_argument("--preload", action="store_true", help="read images once, and keep them in memory")
    parser.add_argument("--workers", type=int, default=0, help="processes that read them")
    parser.add_argument("--arguments", default="{}", help='more arguments, as JSON: {"DecAD": {"delta": 2.0}}')
    parser.add_argument("--progress", action="store_true", help="progress bars in the logs")
    parser.add_argument("--output", type=Path, default=Path("results/race"))
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    command_line = sys.argv[1:]
    args = parser.parse_args()
    args.command_line = command_line[: command_line.index("--worker")] if args.worker else command_line
    args.probe = False
    common.check_data(args)
    return args


if __name__ == "__main__":
    main()
