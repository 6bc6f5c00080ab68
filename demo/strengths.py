# SPDX-License-Identifier: Apache-2.0
"""Say how well a run found defects of each strength.

usage: python demo/strengths.py PREDICTIONS.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from products import STRENGTHS


def by_strength(table: pd.DataFrame) -> dict[str, float]:
    """Compute the image AUROC of each strength in %, against the same product's normal images: the mean of products.

    Args:
        table (pd.DataFrame): Test images with the columns ``path``, ``product`` and ``raw_score``. The score before the
            post-processor is taken, which clips scores: equal ones have no order.
    """
    folders = table["path"].map(lambda path: Path(path).parent.name)
    found = {}
    for strength in STRENGTHS:
        values = []
        chosen = table[(folders == "good") | folders.str.endswith(f"_{strength}")]
        for _, images in chosen.groupby("product"):
            labels = folders[images.index] != "good"
            if labels.nunique() == 2:
                values.append(roc_auc_score(labels, images["raw_score"]))
        if values:
            found[strength] = 100 * float(np.mean(values))
    return found


def main() -> None:
    """Print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", type=Path, help="predictions.csv of a test")
    figures = by_strength(pd.read_csv(parser.parse_args().predictions))
    line = ", ".join(f"{value:.1f} ({strength})" for strength, value in figures.items())
    print(f"\nImage AUROC in % by strength of the defect, mean of the products: {line}")


if __name__ == "__main__":
    main()
