# SPDX-License-Identifier: Apache-2.0
"""Say how well a trained model finds defects of each strength.

usage: python demo/strengths.py MODEL.ckpt DATA
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from anomalib.engine import Engine
from sklearn.metrics import roc_auc_score

from anomalib_decad import DecAD, MultiCategory
from products import STRENGTHS


def by_strength(scores: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Compute the image AUROC of each strength against the normal images of the same product, and the mean.

    Args:
        scores (dict): Scores by product and folder, such as ``good`` and ``scratch_faint``.
    """
    found = {}
    for strength in STRENGTHS:
        values = []
        for folders in scores.values():
            normal = folders["good"]
            defects = [score for name, some in folders.items() if name.endswith(f"_{strength}") for score in some]
            if normal and defects:
                labels = [0] * len(normal) + [1] * len(defects)
                values.append(roc_auc_score(labels, [*normal, *defects]))
        if values:
            found[strength] = 100 * float(np.mean(values))
    return found


def main() -> None:
    """Score all test images and print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint of a DecAD")
    parser.add_argument("data", type=Path, help="folder that products.py has written")
    arguments = parser.parse_args()
    # Scores as they come: the post-processor clips them, and equal scores cannot be ranked.
    model = DecAD.load_from_checkpoint(arguments.model, post_processor=False, visualizer=False, evaluator=False)
    datamodule = MultiCategory("MVTecAD", root=arguments.data, eval_batch_size=16, num_workers=0)
    engine = Engine(logger=False, enable_progress_bar=False)
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for batch in engine.predict(model, datamodule=datamodule) or ():
        for item in batch:
            path = Path(item.image_path)
            scores[path.parents[2].name][path.parent.name].append(float(item.pred_score))
    figures = [f"{value:.1f} ({strength})" for strength, value in by_strength(scores).items()]
    print("Image AUROC in % by strength of the defect:", ", ".join(figures))


if __name__ == "__main__":
    main()
