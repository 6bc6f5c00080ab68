# SPDX-License-Identifier: Apache-2.0
"""What is kept of a test, in bounded memory."""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from anomalib_decad.metrics import ScoreHistogram
from anomalib_decad.report.pictures import Picture

__all__ = ["Example", "Kind", "ProductRecord"]

Kind = Literal["normal", "defect", "unlabelled"]

#: Different scores of a product that its curves are drawn of.
_MOST_SCORES = 4096

#: Scores that are counted at once.
_PENDING = 512


@dataclass
class Example:
    """An image of the gallery.

    Args:
        path (str): Path of the file; empty if it is not known.
        defect_type (str): Name of the folder that the file is in.
        kind (Kind): Whether it is normal.
        flagged (bool | None): Whether the model calls it anomalous; ``None`` without a threshold.
        score (float): The score before the post-processor.
        picture (Picture): How it looks.
    """

    path: str
    defect_type: str
    kind: Kind
    flagged: bool | None
    score: float
    picture: Picture

    @property
    def is_wrong(self) -> bool:
        """Whether it is a false alarm or a missed defect."""
        return is_wrong(self.kind, self.flagged)


def is_wrong(kind: Kind, flagged: bool | None) -> bool:
    """Tell whether a decision is a false alarm or a missed defect."""
    return (kind == "normal" and flagged is True) or (kind == "defect" and flagged is False)


class ProductRecord:
    """Scores, decisions and the images of one product that are worth a look.

    Scores are counted in a histogram. Of the images those are kept that are wrong, the worst of them first, and then
    those that are nearest to being so: the normal images of the highest and the defects of the lowest scores.

    Args:
        max_images (int): Images of each kind to keep.
    """

    def __init__(self, max_images: int) -> None:
        self.max_images = max_images
        self._labelled, self._unlabelled = ScoreHistogram(_MOST_SCORES), ScoreHistogram(_MOST_SCORES)
        self._pending: list[tuple[float, Kind]] = []
        #: Images of each kind, the "flagged" of each kind, those "undecided" for want of a threshold, and "unscored".
        self.counts: Counter[str] = Counter()
        self.heat_range = (float("inf"), float("-inf"))
        self._kept: dict[str, list[tuple[Any, ...]]] = {"normal": [], "defect": [], "unlabelled": []}
        self._order = itertools.count()

    @property
    def num_images(self) -> int:
        """Number of images, with those that have no finite score."""
        return sum(self.counts[kind] for kind in self._kept)

    def add(self, kind: Kind, flagged: bool | None, score: float, make: Callable[[], Example]) -> None:
        """Add the prediction of an image.

        Args:
            kind (Kind): Whether the image is normal.
            flagged (bool | None): Whether the model calls it anomalous; ``None`` without a threshold.
            score (float): The score.
            make (Callable[[], Example]): Makes what the gallery shows; called if the image is kept for now.
        """
        self.counts[kind] += 1
        if flagged is None:
            self.counts["undecided"] += 1
        else:
            self.counts[f"flagged {kind}"] += flagged
        if not math.isfinite(score):
            self.counts["unscored"] += 1
            return
        self._pending.append((score, kind))
        if len(self._pending) >= _PENDING:
            self._count_pending()
        key = is_wrong(kind, flagged), -score if kind == "defect" else score
        kept = self._kept[kind]
        if len(kept) < self.max_images or key > kept[0][0]:
            self._push(kind, key, make())

    @property
    def scores(self) -> ScoreHistogram:
        """The scores of normal images (negatives) and of defects (positives)."""
        self._count_pending()
        return self._labelled

    @property
    def unlabelled(self) -> ScoreHistogram:
        """The scores of the images without labels, as negatives."""
        self._count_pending()
        return self._unlabelled

    def widen(self, low: float, high: float) -> None:
        """Take the range of an anomaly map into that of the product."""
        self.heat_range = min(self.heat_range[0], low), max(self.heat_range[1], high)

    def merge(self, other: "ProductRecord") -> None:
        """Add the record of another process; an image that both have seen is kept once."""
        self.scores.merge(other.scores)
        self.unlabelled.merge(other.unlabelled)
        self.counts.update(other.counts)
        self.widen(*other.heat_range)
        for kind, theirs in other._kept.items():
            paths = {entry[2].path for entry in self._kept[kind]} - {""}
            for key, _, example in theirs:
                if example.path not in paths:
                    self._push(kind, key, example)

    def chosen(self, limit: int) -> list[Example]:
        """Choose the images to show, in the order to show them.

        Args:
            limit (int): Largest number of images.

        Returns:
            list[Example]: False alarms and missed defects in turns, the worst first; then those that are right, normal
                images and defects in turns, from the threshold outwards; then those without labels from the highest
                score downwards.
        """
        ranked = {
            kind: [entry[2] for entry in sorted(kept, key=lambda entry: entry[:2], reverse=True)]
            for kind, kept in self._kept.items()
        }
        labelled = ranked["normal"], ranked["defect"]
        wrong = _in_turns(*([example for example in examples if example.is_wrong] for examples in labelled))
        right = _in_turns(*([example for example in examples if not example.is_wrong] for examples in labelled))
        return [*wrong, *right, *ranked["unlabelled"]][:limit]

    def _count_pending(self) -> None:
        """Count scores, many at a time."""
        for histogram, kinds in ((self._labelled, ("normal", "defect")), (self._unlabelled, ("unlabelled",))):
            rows = [(score, kind == "defect") for score, kind in self._pending if kind in kinds]
            if rows:
                scores, labels = zip(*rows, strict=True)
                histogram.update(torch.tensor(scores), torch.tensor(labels))
        self._pending = []

    def _push(self, kind: str, key: tuple[bool, float], example: Example) -> None:
        kept = self._kept[kind]
        # Of equal ones the first stays, and no two entries have to be compared as examples.
        heapq.heappush(kept, (key, -next(self._order), example))
        if len(kept) > self.max_images:
            heapq.heappop(kept)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the counter, which cannot be pickled."""
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Number what comes behind what is there."""
        vars(self).update(state)
        self._order = itertools.count(sum(self.counts.values()))


def _in_turns(*lists: list[Example]) -> list[Example]:
    """Take one of each list in turn, as long as it has some."""
    rows = itertools.zip_longest(*lists)
    return [example for row in rows for example in row if example is not None]
