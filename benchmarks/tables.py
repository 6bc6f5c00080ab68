# SPDX-License-Identifier: Apache-2.0
"""Tables of experiments."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from anomalib_decad.metrics import MAD, METRICS, CategoryMetrics

__all__ = ["print_table", "rounded", "summarize", "table_of"]


def rounded(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Round a table for the log."""
    return {name: {key: round(value, 5) for key, value in row.items()} for name, row in table.items()}


def table_of(metrics: CategoryMetrics) -> dict[str, dict[str, float]]:
    """Compute the seven metrics, and their mean, of each category and of all."""
    return {name: {metric: row[metric] for metric in (*METRICS, MAD)} for name, row in metrics.compute().items()}


def print_table(title: str, rows: Iterable[tuple[str, Sequence[dict[str, Any]]]], args: argparse.Namespace) -> None:
    """Print a table of runs: a title for the first column, and for each row its name and the runs of all seeds."""
    print(f"| {title} | {' | '.join(METRICS)} | mAD | chosen by | reported |")
    print("|---" * (len(METRICS) + 4) + "|")
    for name, lines in rows:
        print(f"| {name} | {summarize(lines, args)} |")


def summarize(lines: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """Write means over seeds, and their standard deviation, in percent."""

    def of(read: Callable[[dict[str, Any]], float]) -> str:
        values = [100 * read(line["metrics"]) for line in lines]
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{deviation}"

    def half(chosen: bool) -> Callable[[dict[str, Any]], float]:
        return lambda metrics: statistics.mean(
            row[MAD] for name, row in metrics.items() if name != "mean" and (name in args.choose) == chosen
        )

    cells = [of(lambda metrics, key=metric: metrics["mean"][key]) for metric in (*METRICS, MAD)]
    if args.choose:
        cells += [of(half(chosen=True)), of(half(chosen=False))]
    return " | ".join(cells)
