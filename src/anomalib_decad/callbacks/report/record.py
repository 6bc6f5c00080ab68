# SPDX-License-Identifier: Apache-2.0
"""What is kept of a test until the page is written."""

import itertools
import math
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anomalib_decad.callbacks.report.pictures import Picture

__all__ = ["KINDS", "Example", "Kind", "ProductRecord"]

Kind = Literal["normal", "defect", "unlabelled"]
KINDS: tuple[Kind, ...] = ("normal", "defect", "unlabelled")


@dataclass
class Example:
    """An image with its prediction."""

    path: str  # empty if unknown
    kind: Kind
    flagged: bool | None  # whether the model calls it anomalous; None without a threshold
    score: float
    picture: Picture | None = None  # of an image that is kept

    @property
    def is_wrong(self) -> bool:
        """Whether it is a false alarm or a missed defect."""
        return (self.kind, self.flagged) in {("normal", True), ("defect", False)}

    @property
    def rank(self) -> tuple[bool, float]:
        """Its place among its kind, the largest first: wrong ones, the worst of them first, then the nearly wrong."""
        return self.is_wrong, -self.score if self.kind == "defect" else self.score

    @property
    def defect_type(self) -> str:
        """Name of the folder that the file is in."""
        return Path(self.path).parent.name


class ProductRecord:
    """The scores and decisions of one product, and its images that are worth a look.

    Args:
        max_images (int): Images to keep of each kind. Of the others only the score is kept, 8 bytes.
        threshold (float | None): Threshold, in the unit of the scores.
        is_raw (bool): Whether scores are as the model gave them, not normalized.
    """

    def __init__(self, max_images: int, threshold: float | None = None, is_raw: bool = True) -> None:
        self.max_images, self.threshold, self.is_raw = max_images, threshold, is_raw
        self.scores = {kind: array("d") for kind in KINDS}
        #: "images", those of each kind, "flagged <kind>", "undecided", "unscored" (not finite) and "without mask".
        self.counts: Counter[str] = Counter()
        self._kept: dict[Kind, list[Example]] = {kind: [] for kind in KINDS}

    def add(self, example: Example) -> bool:
        """Add an image, and tell whether it is kept for now, so that its picture is needed."""
        self.counts.update(("images", example.kind))
        self.counts["undecided"] += example.flagged is None
        self.counts[f"flagged {example.kind}"] += bool(example.flagged)
        if not math.isfinite(example.score):
            self.counts["unscored"] += 1
            return False
        self.scores[example.kind].append(example.score)
        return self._keep(example)

    def merge(self, other: "ProductRecord") -> None:
        """Add the record of another process; an image that both have seen is shown once."""
        self.counts.update(other.counts)
        for kind in KINDS:
            self.scores[kind].extend(other.scores[kind])
            paths = {example.path for example in self._kept[kind]} - {""}
            for example in other._kept[kind]:
                if example.path not in paths:
                    self._keep(example)

    def chosen(self, limit: int) -> list[Example]:
        """Choose at most ``limit`` images to show, in this order.

        False alarms and missed defects in turns, the worst first; then right ones, normal images and defects in turns,
        from the threshold outwards; then images without labels, the highest score first.
        """
        shown: list[Example] = []
        for is_wrong in (True, False):
            groups = ([one for one in self._kept[kind] if one.is_wrong == is_wrong] for kind in ("normal", "defect"))
            shown += [one for pair in itertools.zip_longest(*groups) for one in pair if one is not None]
        return [*shown, *self._kept["unlabelled"]][:limit]

    def _keep(self, example: Example) -> bool:
        kept = self._kept[example.kind]
        if len(kept) == self.max_images and example.rank <= kept[-1].rank:
            return False
        kept.append(example)
        kept.sort(key=lambda one: one.rank, reverse=True)
        del kept[self.max_images :]
        return True
