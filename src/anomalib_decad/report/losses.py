# SPDX-License-Identifier: Apache-2.0
"""The losses of a training, in bounded memory."""

import math
import time
from collections.abc import Mapping
from typing import Any

__all__ = ["LossCurves"]

# This package's models log the first, which loggers group, anomalib's the second. They are of one length.
_PREFIXES = ("train/", "train_")


class LossCurves:
    """Keeps what a training logs as ``train/*`` or ``train_*``, thinned out as it grows.

    Reading a value makes the processor wait for a GPU. So the first steps are read one by one, and later ones not more
    often than every fifth of a second.

    Args:
        max_points (int): Steps to keep.
            Defaults to ``1000``.
        first_steps (int): Steps at the beginning that are all read.
            Defaults to ``50``.
        interval (float): Seconds between two reads after that.
            Defaults to ``0.2``.
    """

    def __init__(self, max_points: int = 1000, first_steps: int = 50, interval: float = 0.2) -> None:
        self.max_points, self.first_steps, self.interval = max_points, first_steps, interval
        #: Step and value of each curve, by name without ``train/``.
        self.points: dict[str, list[tuple[int, float]]] = {}
        self._count = 0
        self._read_at = -math.inf
        self._every = 1

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint keeps of them, plain lists and numbers."""
        points = {name: list(points) for name, points in self.points.items()}
        return {"points": points, "count": self._count, "every": self._every}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint has kept.

        Args:
            state (Mapping[str, Any]): What :meth:`state_dict` gave.
        """
        self.points = {
            name: [(int(step), float(value)) for step, value in points] for name, points in state["points"].items()
        }
        self._count, self._every = state["count"], state["every"]

    def is_due(self, is_last: bool = False) -> bool:
        """Tell whether the values of the step that has been done are to be read.

        Args:
            is_last (bool): Whether it is the last step.

        Returns:
            bool: Whether :meth:`add` is to be called.
        """
        self._count += 1
        now = time.monotonic()
        is_time = self._count <= self.first_steps or now - self._read_at >= self.interval
        if not is_last and (self._count % self._every or not is_time):
            return False
        self._read_at = now
        return True

    def add(self, step: int, logged: Mapping[str, object]) -> None:
        """Add the values of a step.

        Args:
            step (int): Number of the step.
            logged (Mapping[str, object]): What has been logged, numbers or tensors of one value.
        """
        for name, value in logged.items():
            if not name.startswith(_PREFIXES) or name.endswith("_epoch"):
                continue
            short = name[len(_PREFIXES[0]) :]
            if short.endswith("_step"):
                if name.removesuffix("_step") in logged:
                    continue
                short = short.removesuffix("_step")
            number = float(value)  # type: ignore[arg-type]
            if math.isfinite(number):
                self.points.setdefault(short, []).append((step, number))
        if max(map(len, self.points.values()), default=0) > self.max_points:
            self._every *= 2
            # With the last one, which is what the training has come to.
            self.points = {name: points[-1::-2][::-1] for name, points in self.points.items()}
