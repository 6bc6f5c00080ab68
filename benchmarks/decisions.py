# SPDX-License-Identifier: Apache-2.0
"""How good labels are with one threshold for all products, with one for each, and with no defect at hand.

usage: python benchmarks/decisions.py --data ROOT --steps 100 --seeds 0

Trains one model on nine tenths of the training images of all categories in ROOT (MVTec AD's layout), by cached features
as `experiments.py` does, whose arguments it has. Then, for each category:

- best: the largest F1 score of the labels that any threshold gives on its test images;
- own, joint: that of the category's own threshold, and of one for all, both with the largest F1 score on the test
  images, which anomalib validates with for MVTec AD;
- own/2, joint/2: found on every second test image, and measured on the others;
- FAR 5 %, FAR 1 %: false alarm rate on the normal test images, and recall on the others, where the threshold is that of
  `FalseAlarmRate`, found on the tenth of the training images that was held out.

Then how well the categories are recognized, and images of a category that is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score

import common
from anomalib_decad import DecAD
from anomalib_decad.components import CategoryRecognizer
from anomalib_decad.metrics import ScoreHistogram
from anomalib_decad.thresholds import BestF1, FalseAlarmRate
from experiments import load, parse, train
from features import Split, chunks

_EVERY = 10
_RATES = (0.05, 0.01)

#: Training images of each category that it is recognized by, as in a training.
_KNOWN = 16


@torch.inference_mode()
def scores_of(model: DecAD, split: Split, rows: Sequence[int]) -> np.ndarray:
    """Score images, shape (len(rows),)."""
    net = model.eval().model.fused(None)
    parts = []
    for chunk in chunks(rows, 16):
        features = split.batch(chunk, net.encoder.layers).features()
        parts.append(net.inference_output(features, split.grid, tuple(model.input_size)).pred_score)
    return torch.cat(parts).float().cpu().numpy()


@torch.inference_mode()
def descriptors_of(split: Split, layers: Sequence[int]) -> torch.Tensor:
    """Describe all images of a split, shape (images, dim)."""
    parts = [
        CategoryRecognizer.describe(split.batch(chunk, layers).features())
        for chunk in chunks(range(len(split.categories)), 16)
    ]
    return torch.cat(parts)


def histogram(scores: np.ndarray, labels: np.ndarray) -> ScoreHistogram:
    """Count scores."""
    counts = ScoreHistogram()
    counts.update(torch.from_numpy(scores), torch.from_numpy(labels))
    return counts


def f1_of(scores: np.ndarray, labels: np.ndarray, threshold: float) -> float:
    """Compute the F1 score of the labels that a threshold gives."""
    return float(f1_score(labels, scores > np.float32(threshold)))


def decide(names: list[str], scores: np.ndarray, labels: np.ndarray, held_out: dict[str, np.ndarray]) -> dict[str, Any]:
    """Compare thresholds.

    Args:
        names (list[str]): Category of each test image.
        scores (np.ndarray): Their scores.
        labels (np.ndarray): Whether they have a defect.
        held_out (dict[str, np.ndarray]): Scores of the training images of each category that were held out.

    Returns:
        dict[str, Any]: What was measured of each category.
    """
    categories = np.array(names)
    odd = np.zeros(len(names), dtype=bool)
    for category in dict.fromkeys(names):
        odd[np.flatnonzero(categories == category)[1::2]] = True
    joint = BestF1().choose(histogram(scores, labels))
    joint_half = BestF1().choose(histogram(scores[~odd], labels[~odd]))
    table: dict[str, Any] = {}
    for category in dict.fromkeys(names):
        rows = categories == category
        score, label, half = scores[rows], labels[rows], odd[rows]
        row = {
            "best": max(f1_score(label, score >= value) for value in np.unique(score)),
            "own": f1_of(score, label, BestF1().choose(histogram(score, label))),
            "joint": f1_of(score, label, joint),
            "own/2": f1_of(score[half], label[half], BestF1().choose(histogram(score[~half], label[~half]))),
            "joint/2": f1_of(score[half], label[half], joint_half),
            "joint false alarms": float((score[~label] > np.float32(joint)).mean()),
        }
        normal = held_out[category]
        for rate in _RATES:
            found = score > np.float32(FalseAlarmRate(rate).choose(histogram(normal, np.zeros(len(normal), bool))))
            row[f"FAR {rate:.0%}: false alarms"] = float(found[~label].mean())
            row[f"FAR {rate:.0%}: recall"] = float(found[label].mean())
        table[category] = {name: round(float(value), 4) for name, value in row.items()}
    columns = next(iter(table.values()))
    table["mean"] = {name: round(float(np.mean([row[name] for row in table.values()])), 4) for name in columns}
    return table


def recognize(splits: dict[str, Split], layers: Sequence[int]) -> dict[str, float]:
    """Measure how well categories are recognized, each left out once, too."""
    described = {name: descriptors_of(split, layers) for name, split in splits.items()}
    names = splits["train"].categories
    truth = np.array(splits["test"].categories)
    right, flagged, missed = 0, [], []
    for left_out in (None, *sorted(set(names))):
        known = {}
        for category in sorted(set(names) - {left_out}):
            rows = [row for row, name in enumerate(names) if name == category]
            count = min(_KNOWN, len(rows))
            known[category] = described["train"][[rows[number * len(rows) // count] for number in range(count)]]
        recognizer = CategoryRecognizer()
        recognizer.learn(known)
        # The nearest, and whether it is near enough.
        index = recognizer([described["test"][:, None]]).numpy()
        recognizer.limit.fill_(float("inf"))
        nearest = np.array(recognizer.names)[recognizer([described["test"][:, None]]).numpy()]
        if left_out is None:
            right = int((nearest == truth).sum())
            flagged = [float((index == -1).mean())]
        else:
            missed += (index[truth == left_out] != -1).tolist()
    return {
        "recognized": round(right / len(truth), 5),
        "known images that are called unlike": round(flagged[0], 5),
        "images of a left out category that are called unlike": round(1 - float(np.mean(missed)), 5),
    }


def main() -> None:
    """Train and measure, once for each seed."""
    args: argparse.Namespace = parse(__doc__, varies=False, log="decisions.jsonl")
    splits = load(args, args.layers)
    normal = splits["train"]
    held: dict[str, list[int]] = {}
    for category in dict.fromkeys(normal.categories):
        rows = [row for row, name in enumerate(normal.categories) if name == category]
        held[category] = rows[::_EVERY]
    out = {row for rows in held.values() for row in rows}
    kept = [row for row in range(len(normal.categories)) if row not in out]
    recognition = recognize(splits, args.layers)
    print(json.dumps(recognition), flush=True)
    for seed in args.seeds:
        model, seconds, _ = train(args, splits, args.settings, seed, kept)
        scores = scores_of(model, splits["test"], range(len(splits["test"].labels)))
        held_out = {category: scores_of(model, normal, rows) for category, rows in held.items()}
        table = decide(splits["test"].categories, scores, splits["test"].labels.numpy(), held_out)
        line = {
            "time": time.strftime("%Y-%m-%d %H:%M"), "name": args.name or "decisions", **common.machine(),
            "settings": args.settings, "seed": seed, "steps": args.steps, "batch_size": args.batch_size,
            "encoder": args.encoder, "image_size": args.image_size, "training_seconds": round(seconds, 1),
            "recognition": recognition, "decisions": table,
        }  # fmt: skip
        with Path(args.log).open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(f"seed {seed}")
        for name, row in table.items():
            print(f"  {name}: " + ", ".join(f"{key} {100 * value:.1f}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
