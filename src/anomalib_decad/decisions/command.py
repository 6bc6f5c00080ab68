# SPDX-License-Identifier: Apache-2.0
"""Shows and changes the thresholds of a trained model, without training or export.

usage: decad-thresholds model.ckpt                                     # shows them
       decad-thresholds model.ckpt --category bottle --image 0.61      # of one product
       decad-thresholds model.ckpt --image 0.5 --pixel 0.7             # of images of no known product
       decad-thresholds model.thresholds.json --category bottle --image 0.55    # of an exported model

Thresholds of a checkpoint are in raw scores, the column raw_score of predictions.csv. Those of an exported model are in
normalized scores, the column score, where 0.5 is the threshold that it was exported with, unless it gives raw scores.
"""

import argparse
import json
import math
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anomalib_decad.decisions.limits import Limits
from anomalib_decad.decisions.post_processor import CategoryPostProcessor
from anomalib_decad.decisions.thresholds_file import RANGES, is_threshold, read_thresholds
from anomalib_decad.whole_files import replacing

__all__ = ["main"]

_PREFIX = "post_processor."
_ALL = "(no known product)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Show or change thresholds.

    Args:
        arguments (Sequence[str] | None): The command line.
            Defaults to ``None``: that of the process.
    """
    parser = argparse.ArgumentParser(
        prog="decad-thresholds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a checkpoint, or the .thresholds.json beside an exported model")
    parser.add_argument("--category", help="the product whose thresholds change")
    parser.add_argument("--image", type=float, help="new threshold for the scores of images")
    parser.add_argument("--pixel", type=float, help="new threshold for the scores of pixels")
    parser.add_argument("--output", type=Path, help="where the changed model goes; else into its own file")
    args = parser.parse_args(arguments)
    change = _change_export if args.model.suffix == ".json" else _change_checkpoint
    try:
        lines, units = change(args)
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        is_text = isinstance(error, OSError | ValueError | RuntimeError)
        reason = str(error).strip().partition("\n")[0] if is_text else ""
        parser.exit(
            2, f"decad-thresholds: error: {args.model}: {reason or 'no checkpoint and no thresholds of an export'}\n"
        )
    table = Table(title=f"Thresholds in {units}", title_justify="left")
    table.add_column("product", overflow="fold")
    table.add_column("image", justify="right")
    table.add_column("pixel", justify="right")
    for name, image, pixel in lines:
        table.add_row(Text(name), *("-" if value is None else f"{value:.6g}" for value in (image, pixel)))
    Console().print(table)


def _is_change(args: argparse.Namespace) -> bool:
    if args.category is not None and args.image is None and args.pixel is None:
        msg = "what is the threshold of the category to be? Give --image, --pixel or both"
        raise ValueError(msg)
    is_change = args.image is not None or args.pixel is not None
    if args.output is not None and not is_change:
        msg = "--output is for a change: give --image, --pixel or both"
        raise ValueError(msg)
    return is_change


def _change_checkpoint(args: argparse.Namespace) -> tuple[list[tuple[str, float | None, float | None]], str]:
    checkpoint = torch.load(args.model, map_location="cpu", weights_only=True)
    state = checkpoint.get("state_dict", {}) if isinstance(checkpoint, dict) else {}
    own = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
    if "category_limits" not in own:
        msg = "a checkpoint without thresholds of each product: train it with this version"
        raise ValueError(msg)
    post_processor = CategoryPostProcessor()
    post_processor.load_state_dict(own)
    if _is_change(args):
        post_processor.set_threshold(args.category, args.image, args.pixel)
        checkpoint["state_dict"].update(post_processor.state_dict(prefix=_PREFIX))
        # It is a callback, too, and Lightning restores callbacks last.
        for callback in checkpoint.get("callbacks", {}).values():
            if isinstance(callback, dict) and "category_limits" in callback:
                callback.update(post_processor.state_dict())
        _write(args, lambda path: torch.save(checkpoint, path))
    names = [*post_processor.categories, None]
    limits: list[tuple[str | None, Limits]] = [(name, post_processor.limits(name)) for name in names]
    # Of a model that was never validated they are NaN.
    known = [(name or _ALL, _known(row.image_threshold), _known(row.pixel_threshold)) for name, row in limits]
    return known, "raw scores"


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _change_export(args: argparse.Namespace) -> tuple[list[tuple[str, float | None, float | None]], str]:
    content = read_thresholds(args.model)
    unit = content["unit"]
    if _is_change(args):
        rows = [row for row in content["categories"] if row["name"] == args.category]
        if args.category is not None and not rows:
            msg = f"no category {args.category!r}: there are {', '.join(row['name'] for row in content['categories'])}"
            raise ValueError(msg)
        chosen: dict[str, Any] = rows[0] if rows else content
        for kind in ("image", "pixel"):
            value = getattr(args, kind)
            if value is None:
                continue
            if not is_threshold(value, unit):
                msg = f"{unit} scores are {RANGES[unit]}, a threshold of {value} is not"
                raise ValueError(msg)
            chosen[kind] = value
        _write(args, lambda path: path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))
    lines = [(row["name"], row["image"], row["pixel"]) for row in content["categories"]]
    return [*lines, (_ALL, content["image"], content["pixel"])], f"{unit} scores"


def _write(args: argparse.Namespace, write: Any) -> None:
    """Write a file whole or not at all."""
    # What a link names, not the link.
    target: Path = (args.output or args.model).resolve()
    if target.exists() and not target.is_file():
        msg = f"{target} is no file that could be replaced: give another --output"
        raise ValueError(msg)
    with replacing(target) as partial:
        write(partial)
        if target.exists():
            shutil.copymode(target, partial)


if __name__ == "__main__":
    main()
