# SPDX-License-Identifier: Apache-2.0
"""What the anomaly map and the image score are made of: variants on one trained model.

usage: python benchmarks/anomaly_map.py --data ROOT --steps 100 [--seeds 0] [--choose toothbrush tile] ...

Takes the arguments of experiments.py, trains one model for each seed, and scores it with other layers, exponents of the
energy, blurs and shares of the pixels that make the image score. Only one of them differs from the default at a time.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

import experiments
from anomalib_decad import DecAD
from anomalib_decad.components.decoder import patch_errors
from anomalib_decad.metrics import CategoryMetrics
from anomalib_decad.models.decad import AnomalyMapGenerator, AnomalyMapOptions
from features import Split, chunks
from tables import print_table, table_of


@dataclass(frozen=True)
class Variant:
    """A way to make maps and scores.

    Args:
        layers (tuple[int, ...]): Which of the model's feature maps, counted from 0.
        energy_power (float): Exponent of the energy.
        blur_sigma (float): Blur in pixels.
        score_fraction (float): Share of the pixels whose mean is the score; 0 for the largest pixel alone.
    """

    layers: tuple[int, ...]
    energy_power: float
    blur_sigma: float
    score_fraction: float


def variants(default: Variant) -> dict[str, Variant]:
    """Name all variants of a default."""
    result = {"default": default}
    for number in default.layers if len(default.layers) > 1 else ():
        result[f"layer {number + 1} alone"] = replace(default, layers=(number,))
        result[f"without layer {number + 1}"] = replace(default, layers=tuple(set(default.layers) - {number}))
    for name, values in (
        ("energy_power", (0.0, 0.25, 0.5, 1.0)),
        ("blur_sigma", (0.0, 4.0, 6.0, 8.0)),
        ("score_fraction", (0.0, 0.001, 0.01, 0.03, 0.1)),
    ):
        for value in values:
            result[f"{name} {value:g}"] = replace(default, **{name: value})
    return result


@torch.inference_mode()
def outputs(model: DecAD, test: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute errors of each layer, of shape (images, layers, N), and energies, of shape (images, N)."""
    net = model.eval().model.fused(None)
    errors, energies = [], []
    for chunk in chunks(range(len(test.labels)), 16):
        features = test.batch(chunk, net.encoder.layers).features()
        _, product = net.recognizer.nearest(net.recognizer.describe(features))
        clean, energy = net.remove(net.fusion(features), product)
        pairs = zip(net.standardizer(features), net.decoder(clean), strict=True)
        errors.append(torch.stack([patch_errors([a], [b]) for a, b in pairs], dim=1))
        energies.append(energy)
    return torch.cat(errors), torch.cat(energies)


@torch.inference_mode()
def score(
    args: argparse.Namespace, variant: Variant, errors: torch.Tensor, energies: torch.Tensor, test: Split
) -> dict[str, dict[str, float]]:
    """Compute the seven metrics, and their mean, of each category and of all."""
    size = (args.image_size, args.image_size)
    # The share of one pixel is the smallest.
    generator = AnomalyMapGenerator(
        AnomalyMapOptions(variant.blur_sigma, variant.score_fraction or 1 / (size[0] * size[1]))
    )
    combined = errors[:, list(variant.layers)].mean(1) * energies.pow(variant.energy_power)
    metrics = CategoryMetrics()
    for chunk in chunks(range(len(errors)), 64):
        maps, scores = generator.maps_and_scores(combined[chunk], test.grid, size)
        metrics.update([test.categories[i] for i in chunk], scores, test.labels[chunk], maps, test.masks[chunk])
    return table_of(metrics)


def main() -> None:
    """Print a table."""
    args = experiments.parse(__doc__, varies=False)
    splits = experiments.load(args, args.layers)
    lines: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        model, _, _ = experiments.train(args, splits, args.settings, seed)
        errors, energies = outputs(model, splits["test"])
        options = model.model.anomaly_map_generator.options
        default = Variant(
            tuple(range(errors.shape[1])), options.energy_power, options.blur_sigma, options.score_fraction
        )
        for name, variant in tqdm(variants(default).items(), desc=f"Scoring seed {seed}"):
            lines.setdefault(name, []).append({"metrics": score(args, variant, errors, energies, splits["test"])})
    print_table("variant", lines.items(), args)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
