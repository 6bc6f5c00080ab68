# SPDX-License-Identifier: Apache-2.0
"""How a threshold is chosen from the scores of a validation."""

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from anomalib_decad.metrics import ScoreHistogram
from anomalib_decad.ranges import check_range

# The quantiles of Student's t grow without bound for two or three scores, and nothing would exceed the threshold.
_LEAST_FREEDOM = 4

__all__ = ["BestF1", "FalseAlarmRate", "FixedThreshold", "ThresholdPolicy"]


@dataclass(frozen=True)
class ThresholdPolicy(ABC):
    """Chooses a threshold: what scores higher is anomalous."""

    @abstractmethod
    def choose(self, histogram: ScoreHistogram) -> float:
        """Choose a threshold for scores of images, or pixels; NaN if they do not have what the policy needs."""

    def without_defects(self) -> "ThresholdPolicy":
        """Give the policy for a product whose validation images have no defect."""
        return self

    def to_config(self) -> dict[str, Any]:
        """Give name and arguments as plain values, for a checkpoint."""
        return {"name": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_config(config: dict[str, Any]) -> "ThresholdPolicy":
        """Create a policy from :meth:`to_config`; KeyError if there is none of that name."""
        policies = {cls.__name__: cls for cls in (BestF1, FalseAlarmRate, FixedThreshold)}
        return policies[config["name"]](**{name: value for name, value in config.items() if name != "name"})


@dataclass(frozen=True)
class BestF1(ThresholdPolicy):
    """The threshold with the largest F1 score, as anomalib has it; halfway between the scores on its two sides.

    Args:
        false_alarm_rate (float): Of a product whose validation images have no defect: the share of normal images, or
            pixels, that may be called anomalous (:class:`FalseAlarmRate`), in (0, 1).

    Raises:
        ValueError: If ``false_alarm_rate`` is out of its range.
    """

    false_alarm_rate: float = 0.01

    def __post_init__(self) -> None:
        _check_rate(self.false_alarm_rate)

    def choose(self, histogram: ScoreHistogram) -> float:
        """Choose the threshold with the largest F1 score; NaN without scores of both kinds."""
        negatives, positives = histogram.totals()
        if not negatives or not positives:
            return math.nan
        return histogram.below(histogram.best_f1()[1])

    def without_defects(self) -> "FalseAlarmRate":
        """Give the policy for a product whose validation images have no defect."""
        return FalseAlarmRate(self.false_alarm_rate)


@dataclass(frozen=True)
class FalseAlarmRate(ThresholdPolicy):
    """The threshold that a share of normal images, or pixels, exceeds. It needs no defects.

    With n normal scores, a new one exceeds the k-th smallest with a probability of 1 - k / (n + 1). Where n is too
    small for the rate, that is below 1 / rate - 1, the threshold is the bound of a prediction interval: what a new
    score exceeds with that probability if scores are normally distributed. It is at least the largest score.

    Args:
        rate (float): The share, in (0, 1).

    Raises:
        ValueError: If ``rate`` is out of its range.
    """

    rate: float = 0.01

    def __post_init__(self) -> None:
        _check_rate(self.rate)

    def choose(self, histogram: ScoreHistogram) -> float:
        """Choose the threshold; NaN without normal scores."""
        scores, counts = histogram.negatives()
        total = counts.sum()
        if not total:
            return math.nan
        rank = math.ceil((total + 1) * (1 - self.rate) - 1e-9)
        if rank <= total:
            return float(scores[np.searchsorted(counts.cumsum(), rank)])
        if total == 1:
            return float(scores[-1])
        mean = np.average(scores, weights=counts)
        variance = np.average((scores - mean) ** 2, weights=counts) * total / (total - 1)
        factor = student.ppf(1 - self.rate, max(total - 1, _LEAST_FREEDOM)) * math.sqrt(1 + 1 / total)
        return float(max(scores[-1], mean + factor * math.sqrt(variance)))

    def is_extrapolated(self, histogram: ScoreHistogram) -> bool:
        """Tell whether there are too few normal scores for the rate, so that the threshold is above all of them."""
        return histogram.totals()[0] + 1 < (1 - 1e-9) / self.rate


@dataclass(frozen=True)
class FixedThreshold(ThresholdPolicy):
    """A threshold that is given.

    Args:
        value (float): The threshold, in units of the raw scores.

    Raises:
        ValueError: If ``value`` is not finite.
    """

    value: float

    def __post_init__(self) -> None:
        check_range(math.isfinite(self.value), "a threshold", "finite", self.value)

    def choose(self, histogram: ScoreHistogram) -> float:
        """Give the threshold."""
        del histogram
        return self.value


def _check_rate(rate: float) -> None:
    check_range(0 < rate < 1, "a false alarm rate", "in (0, 1)", rate)
