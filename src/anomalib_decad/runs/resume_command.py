# SPDX-License-Identifier: Apache-2.0
"""The command that resumes a training."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["is_command_line", "resume_command"]


def is_command_line() -> bool:
    """Tell whether this process is the ``anomalib`` command."""
    return Path(sys.argv[0]).stem.removesuffix("-script") == "anomalib"


def resume_command(
    checkpoint: Path, limits: Mapping[str, int] | None = None, arguments: Sequence[str] | None = None
) -> str:
    """Give the command, or the call, that resumes a training.

    Args:
        checkpoint (Path): The checkpoint to resume from.
        limits (Mapping[str, int] | None): Arguments of the trainer that are not as before, as ``max_steps``.
            Defaults to ``None``: all are.
        arguments (Sequence[str] | None): Arguments of the command that was interrupted.
            Defaults to ``None``: of this process, if it is the ``anomalib`` command.

    Returns:
        str: A line for a shell, or for Python.

    Example:
        >>> resume_command(Path("v0/last.ckpt"), arguments=["train", "--model", "DecAD", "--ckpt_path=old.ckpt"])
        'anomalib fit --model DecAD --ckpt_path v0/last.ckpt'
    """
    if arguments is None:
        if not is_command_line():
            changed = "".join(f"{name}={value}, " for name, value in (limits or {}).items())
            more = f"Engine({changed}...)" if changed else "engine"
            return f"{more}.fit(model, datamodule=datamodule, ckpt_path={str(checkpoint)!r})"
        arguments = sys.argv[1:]
    kept: list[str] = []
    skips = False
    for argument in arguments:
        if skips:
            skips = False
        elif argument == "--ckpt_path":
            skips = True
        elif not argument.startswith("--ckpt_path="):
            # After "train" anomalib would test the checkpoint that was given, and not what has become of it.
            kept.append("fit" if argument == "train" and not kept else argument)
    for name, value in (limits or {}).items():
        kept += [f"--trainer.{name}", str(value)]
    return shlex.join(["anomalib", *kept, "--ckpt_path", str(checkpoint)])
