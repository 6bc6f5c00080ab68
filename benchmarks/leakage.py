# SPDX-License-Identifier: Apache-2.0
"""Plot anomaly leakage over the training: how well errors of patches tell defects, with and without removal.

usage: python benchmarks/leakage.py [--log benchmarks/experiments.jsonl] [--name leakage] [--output docs/leakage.png]

Reads the lines of the log with that name, which `experiments.py --name leakage --score-at 0 100 300 ...` wrote. The
first run of each setting is drawn: the AUROC of the reconstruction errors of defect patches among those of normal ones,
a mean over the categories, with embeddings cleaned and, by the same decoder, as they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt


def read(log: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """Read the curves of a log.

    Args:
        log (Path): A file that experiments.py wrote.
        name (str): Name of the runs.

    Returns:
        dict[str, list[dict[str, Any]]]: For each setting, in words, what was measured on the way.
    """
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    curves: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["name"] == name and line.get("progress"):
            settings = ", ".join(f"{key} {value}" for key, value in line["settings"].items()) or "default"
            curves.setdefault(settings, line["progress"])
    return curves


def auroc(point: dict[str, Any], kind: str) -> float:
    """Average an AUROC of patches over the categories."""
    return statistics.mean(row[kind] for row in point["patch_auroc"].values())


def plot(curves: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Draw the AUROCs over the steps.

    Args:
        curves (dict[str, list[dict[str, Any]]]): Curves by setting.
        output (Path): The image to write.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for index, (label, points) in enumerate(curves.items()):
        steps = [point["step"] for point in points]
        axes.plot(steps, [auroc(point, "error") for point in points], color=f"C{index}", label=label)
        axes.plot(steps, [auroc(point, "kept") for point in points], "--", color=f"C{index}")
    axes.set(
        xlabel="training steps",
        ylabel="AUROC of the errors of patches",
        title="solid: in use, dashed: the same decoder, nothing removed",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main() -> None:
    """Read and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, default=Path(__file__).parent / "experiments.jsonl")
    parser.add_argument("--name", default="leakage")
    parser.add_argument("--output", type=Path, default=Path("docs/leakage.png"))
    args = parser.parse_args()
    curves = read(args.log, args.name) if args.log.is_file() else {}
    if not curves:
        raise SystemExit(f"{args.log} has no run {args.name!r} with --score-at")
    plot(curves, args.output)
    for label, points in curves.items():
        last = points[-1]
        print(f"{label}: {auroc(last, 'error'):.3f}, nothing removed {auroc(last, 'kept'):.3f}")


if __name__ == "__main__":
    main()
