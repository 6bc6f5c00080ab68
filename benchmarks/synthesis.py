# SPDX-License-Identifier: Apache-2.0
"""How hard synthetic anomalies are: their abnormal energies beside those of normal and of real defect patches.

usage: python benchmarks/synthesis.py --data ROOT [--features results/features] [--set delta=2.5 ...]

Takes the arguments of experiments.py, and reads or computes features as that does. The model has a prior of 0, and is
prepared, but not trained: its latent starts at the principal axes. Energies are medians over patches: normal and
synthetic ones of 64 training images, real defects of every fourth test image that has some.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable

import torch
from lightning.pytorch import seed_everything
from torch.nn import functional

import experiments
from anomalib_decad.components import AdversarialSynthesis, SynthesisOptions, sample_patches
from features import chunks

_IMAGES = 64


def plain_step(
    x: torch.Tensor, perturbed: torch.Tensor, energy: Callable[[torch.Tensor], torch.Tensor], delta: float
) -> torch.Tensor:
    """Take a step of length delta along the normalized gradient itself, and go back to the sphere."""
    point = perturbed.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(point).sum(), point)
    return x + delta * functional.normalize(perturbed - delta * functional.normalize(gradient, dim=-1) - x, dim=-1)


def energies(args: Namespace) -> dict[str, torch.Tensor]:
    """Compute energies of normal, synthetic and defect patches.

    Args:
        args (Namespace): Command line of experiments.py.

    Returns:
        dict[str, torch.Tensor]: For each kind of patch, energies of shape (K,).
    """
    splits = experiments.load(args, args.layers)
    net = experiments.create(args, {"decoupler.num_prototypes": 0, **args.settings}).model.train()
    order = torch.randperm(len(splits["train"].categories))[:_IMAGES].tolist()
    features = splits["train"].batch(order, args.layers).features()
    net.initialize(sample_patches([features], len(order), 400 * len(order)))
    x = net.fusion(features)
    energy = net.decoupler.energy
    test = splits["test"]
    result = {"normal": energy(x).flatten()}
    delta = args.settings.get("delta", 2.5)
    for noise in ("gaussian", "features"):
        for steps in (0, 1):
            torch.manual_seed(1)
            perturbed, mask = AdversarialSynthesis(delta, SynthesisOptions(1.0, steps, noise))(x, energy, test.grid)
            result[f"{noise}, {steps} step{'' if steps == 1 else 's'}"] = energy(perturbed[mask])
            if steps == 0:
                plain = plain_step(x[mask], perturbed[mask], energy, delta)
                result[f"{noise}, 1 step along the plain gradient"] = energy(plain)
    defects = []
    for chunk in chunks(test.labels.nonzero().flatten().tolist()[::4], 16):
        embeddings = net.fusion(test.batch(chunk, args.layers).features())
        defects.append(energy(embeddings)[test.defect_shares(chunk) > 0.5])
    return result | {"real defects": torch.cat(defects)}


def main() -> None:
    """Print a table."""
    args = experiments.parse(__doc__, varies=False)
    seed_everything(args.seeds[0], verbose=False)
    print("| patches | median energy |\n|---|---|")
    for name, values in energies(args).items():
        print(f"| {name} | {values.median():.2f} |")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
