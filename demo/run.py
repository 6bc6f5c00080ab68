# SPDX-License-Identifier: Apache-2.0
"""Train one DecAD on several categories by the anomalib command, and show what it finds.

usage: python demo/run.py [--data FOLDER --categories a,b,c] [--steps N] [--output FOLDER]

Without --data, five products with defects of three strengths are drawn. With it, FOLDER is any folder in MVTec AD's
layout.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
# Pictures of defects from each category on the overview.
_EXAMPLES = 3


def run_script(name: str, *arguments: Path) -> None:
    """Run another script of the demo."""
    subprocess.run([sys.executable, str(HERE / name), *map(str, arguments)], check=True)


def train(data: Path, categories: str | None, weights: Path, steps: int, output: Path) -> int:
    """Run ``anomalib train``; its progress bar and its table go to the terminal."""
    command = [
        str(Path(sys.executable).with_name("anomalib")), "train",
        "--model", "DecAD",
        "--model.encoder", "vit_small_patch14_dinov2",
        "--model.encoder_weights", str(weights),
        "--model.feature_cache", "ram",
        "--data", "MultiCategory",
        "--data.datamodule", "MVTecAD",
        "--data.root", str(data),
        "--data.train_batch_size", "8",
        "--data.eval_batch_size", "16",
        "--data.num_workers", "0",
        "--trainer.max_steps", str(steps),
        "--trainer.check_val_every_n_epoch", "null",
        "--trainer.val_check_interval", str(steps),
        "--seed_everything", "0",
        "--default_root_dir", str(output / "results"),
    ]  # fmt: skip
    if categories:
        command += ["--data.categories", f"[{categories}]"]
    print("$", " ".join([Path(command[0]).name, *command[1:]]), "\n", flush=True)
    # The weights are a local file: no hub is asked.
    return subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False).returncode


def overview(images: Path, path: Path) -> None:
    """Join heatmaps of some defects of each category into one picture."""
    chosen: list[Path] = []
    for category in sorted(folder for folder in images.iterdir() if folder.is_dir()):
        defects = sorted(file for file in category.rglob("*.png") if "good" not in file.parts)
        # From the middle of each part, not its first: names are in order, and "faint" is before "strong".
        places = {len(defects) * (2 * part + 1) // (2 * _EXAMPLES) for part in range(_EXAMPLES)}
        chosen += [defects[place] for place in sorted(places) if defects]
    rows = [Image.open(file).convert("RGB") for file in chosen]
    if not rows:
        return
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    sheet.save(path)


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder in MVTec AD's layout instead of the products")
    parser.add_argument("--categories", help="comma-separated names of the categories in --data; default: all")
    parser.add_argument("--steps", type=int, default=100, help="training steps (default: 100)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of everything that is written")
    arguments = parser.parse_args()
    if arguments.data and not arguments.data.is_dir():
        parser.error(f"--data: no such folder: {arguments.data}")
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    start = time.monotonic()
    output = arguments.output
    weights = output / "weights" / "dinov2_vits14.safetensors"
    run_script("dinov2_weights.py", weights)
    data = arguments.data or output / "products"
    if not arguments.data:
        run_script("products.py", data)
    code = train(data, arguments.categories, weights, arguments.steps, output)
    if code:
        return code
    run = max(output.glob("results/DecAD/*/latest"), key=lambda folder: folder.stat().st_mtime)
    overview(run / "images", output / "heatmaps.png")
    predictions = run / "predictions.csv"
    if not arguments.data and predictions.is_file():
        run_script("strengths.py", predictions)
    print(f"\nDone in {time.monotonic() - start:.0f} s. What is where:")
    for what, where in (
        ("some defects", output / "heatmaps.png"),
        ("all heatmaps", run / "images"),
        ("report", run / "report.html"),
        ("metrics", run / "metrics.csv"),
        ("scores", predictions),
        ("trained model", run / "weights" / "lightning" / "model.ckpt"),
        ("configuration", run / "config.yaml"),
    ):
        if where.exists():
            print(f"  {what:14} {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
