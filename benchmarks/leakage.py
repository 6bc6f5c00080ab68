# SPDX-License-Identifier: Apache-2.0
"""Plot the leakage that experiments have measured: errors of defect and of normal patches over the training.

usage: python benchmarks/leakage.py [--log benchmarks/experiments.jsonl] [--name leakage] [--output docs/leakage.png]

Reads the lines of the log with that name, which `experiments.py --name leakage --leakage-every 50 ...` wrote. The first
run of each setting is drawn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt


def read(log: Path, name: str) -> dict[str, list[dict[str, float]]]:
    """Read the curves of a log.

    Args:
        log (Path): A file that experiments.py wrote.
        name (str): Name of the runs.

    Returns:
        dict[str, list[dict[str, float]]]: For each setting, in words, its points.
    """
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    curves: dict[str, list[dict[str, float]]] = {}
    for line in lines:
        if line["name"] == name and line["leakage"]:
            curves.setdefault(describe(line["settings"]), line["leakage"])
    return curves


def describe(settings: dict[str, Any]) -> str:
    """Put settings in words."""
    decoder = "memory" if settings.get("num_prototypes", True) else "transformer decoder"
    others = [f"{key} {value}" for key, value in settings.items() if key not in {"num_prototypes", "decouple"}]
    return ", ".join([decoder, "with removal" if settings.get("decouple", True) else "without removal", *others])


def plot(curves: dict[str, list[dict[str, float]]], output: Path) -> None:
    """Draw errors, and their ratio, over the steps.

    Args:
        curves (dict[str, list[dict[str, float]]]): Curves by setting.
        output (Path): The image to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for index, (label, points) in enumerate(curves.items()):
        steps = [point["step"] for point in points]
        for group, style in (("defect", "-"), ("normal", "--")):
            left.plot(steps, [point[group] for point in points], style, color=f"C{index}")
        right.plot(steps, [point["defect"] / point["normal"] for point in points], color=f"C{index}", label=label)
    left.set(ylabel="1 - cosine similarity", title="error of patches (solid: defect, dashed: normal)")
    right.set(title="error of defect patches / error of normal patches")
    for axes in (left, right):
        axes.set(xlabel="training steps")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
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
        raise SystemExit(f"{args.log} has no run {args.name!r} with --leakage-every")
    plot(curves, args.output)
    for label, points in curves.items():
        last = points[-1]
        ratio = last["defect"] / last["normal"]
        print(f"{label}: defect {last['defect']:.3f}, normal {last['normal']:.3f}, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
