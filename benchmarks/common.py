# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: their arguments, their data, workers of their own process, the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from anomalib_decad import MultiCategory

__all__ = ["argument_parser", "ask_worker", "check_data", "cpu_name", "datamodule", "device_of", "machine", "tell"]

_MARK = "RESULT "


def argument_parser(doc: str | None, data_required: bool = True) -> argparse.ArgumentParser:
    """Create a parser with the arguments of every benchmark.

    Args:
        doc (str | None): Docstring of the script.
        data_required (bool): Whether it needs ``--data``.

    Returns:
        argparse.ArgumentParser: The parser.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=data_required, help="folder in MVTec AD's layout")
    parser.add_argument("--categories", nargs="+", help="default: all that are in the folder")
    parser.add_argument("--encoder", default="vit_small_patch14_dinov2")
    parser.add_argument("--image-size", type=int, default=280)
    parser.add_argument("--batch-size", type=int, default=8)
    return parser


def check_data(args: argparse.Namespace) -> None:
    """End with one line where the data are not; find all categories where none are named."""
    if not args.data.is_dir():
        raise SystemExit(f"--data: no such folder: {args.data}")
    if args.categories is None:
        args.categories = sorted(path.name for path in args.data.iterdir() if (path / "train" / "good").is_dir())


def datamodule(args: argparse.Namespace, **kwargs: Any) -> MultiCategory:
    """Create the datamodule of the command line's data."""
    from anomalib_decad import MultiCategory

    sizes = {"train_batch_size": args.batch_size, "eval_batch_size": args.batch_size}
    options = {"root": args.data, "categories": args.categories, "num_workers": 0, **sizes}
    return MultiCategory("MVTecAD", **{**options, **kwargs})


def device_of(args: argparse.Namespace) -> torch.device:
    """Find the device of the command line's accelerator."""
    import torch

    return torch.device("cuda" if args.accelerator == "gpu" else args.accelerator)


def ask_worker(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a script in a process of its own and read its answer; an error is an answer, too.

    Args:
        script (str): The script, which calls :func:`tell`.
        arguments (Sequence[str]): Its arguments.

    Returns:
        dict[str, Any]: The answer, or ``{"error": ...}``.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRUST_REMOTE_CODE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    for line in result.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    lines = result.stderr.strip().splitlines() or ["no output"]
    return {"error": next((line for line in reversed(lines) if "Error" in line), lines[-1])[:200]}


def tell(answer: dict[str, Any]) -> None:
    """Answer the process that asked."""
    print(_MARK + json.dumps(answer))


def cpu_name() -> str:
    """Name the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def machine() -> dict[str, str]:
    """Describe what figures depend on beside the settings."""
    import anomalib
    import timm
    import torch

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    ).stdout.strip()  # fmt: skip
    return {
        "commit": commit,
        "cpu": f"{cpu_name()}, {torch.get_num_threads()} threads",
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "anomalib": anomalib.__version__,
    }
