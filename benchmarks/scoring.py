# SPDX-License-Identifier: Apache-2.0
"""Scores of a model on cached features, and what is inside it."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.metrics import roc_auc_score

from anomalib_decad import DecAD
from anomalib_decad.components.decoder import patch_errors
from anomalib_decad.metrics import CategoryMetrics
from features import Split, chunks
from tables import rounded, table_of

__all__ = ["measure", "score"]


@torch.inference_mode()
def score(model: DecAD, test: Split, metrics: CategoryMetrics) -> None:
    """Add a model's predictions of test images to metrics."""
    net = model.eval().model.fused(None)
    for chunk in chunks(range(len(test.labels)), 16):
        output = net.inference_output(
            test.batch(chunk, net.encoder.layers).features(), test.grid, tuple(model.input_size)
        )
        metrics.update(
            [test.categories[index] for index in chunk],
            output.pred_score,
            test.labels[chunk],
            output.anomaly_map,
            test.masks[chunk],
        )


@torch.inference_mode()
def measure(model: DecAD, test: Split, total: CategoryMetrics | None = None) -> dict[str, Any]:
    """Look into a model.

    Args:
        model (DecAD): The model.
        test (Split): Test images.
        total (CategoryMetrics | None): Gets the predictions, too, as of :func:`score`.

    Returns:
        dict[str, Any]: ``metrics``: the seven of the map, and of its error and its energy alone. ``patch_auroc``: for
            each category that has patches of both kinds, how well the decoder's errors, with and without removal, and
            the energies tell defect from normal patches. ``energy``: mean energy of either kind.
    """
    net = model.eval().model.fused(None)
    size = tuple(model.input_size)
    generator, names = net.anomaly_map_generator, ("both", "error", "energy")
    metrics = {name: CategoryMetrics() for name in (names if net.decoupler else names[:2])}
    values: dict[str, list[torch.Tensor]] = {"error": [], "kept": [], "energy": [], "share": []}
    for chunk in chunks(range(len(test.labels)), 16):
        outputs = test.batch(chunk, net.encoder.layers).features()
        x, targets = net.fusion(outputs), net.standardizer(outputs)
        _, product = net.recognizer.nearest(net.recognizer.describe(outputs))
        clean, energy = net.remove(x, product)
        error, kept = (patch_errors(targets, net.decoder(embedding)) for embedding in (clean, x))
        both = error * energy.pow(generator.options.energy_power)
        for name, patches in zip(names, (both, error, energy), strict=True):
            if name in metrics:
                maps, scores = generator.maps_and_scores(patches, test.grid, size)
                categories = [test.categories[index] for index in chunk]
                metrics[name].update(categories, scores, test.labels[chunk], maps, test.masks[chunk])
        for name, patches in (("error", error), ("kept", kept), ("energy", energy)):
            values[name].append(patches.cpu())
        values["share"].append(test.defect_shares(chunk))
    if total is not None:
        total.merge(metrics["both"])
    share = torch.cat(values.pop("share"))
    of_all = {name: torch.cat(parts) for name, parts in values.items()}
    aurocs: dict[str, dict[str, float]] = {}
    for category in dict.fromkeys(test.categories):
        rows = [index for index, name in enumerate(test.categories) if name == category]
        known = (share[rows] > 0.5) | (share[rows] == 0)
        target = (share[rows] > 0.5)[known].numpy()
        if target.any() and not target.all():
            aurocs[category] = {
                name: round(float(roc_auc_score(target, value[rows][known].numpy())), 5)
                for name, value in of_all.items()
            }
    return {
        "metrics": {name: rounded(table_of(metric)) for name, metric in metrics.items()},
        "patch_auroc": aurocs,
        "energy": {
            "normal": round(of_all["energy"][share == 0].mean().item(), 5),
            "defect": round(of_all["energy"][share > 0.5].mean().item(), 5),
        },
    }
