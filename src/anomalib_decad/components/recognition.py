# SPDX-License-Identifier: Apache-2.0
"""Recognition of the product that an image shows, from the encoder's features."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["UNKNOWN", "CategoryPrediction", "CategoryRecognizer", "decode_names", "encode_names"]

logger = logging.getLogger(__name__)

Features = Sequence[torch.Tensor] | Mapping[Any, torch.Tensor]

UNKNOWN = -1  #: Index of an image that is unlike every category.

# An image is unlike a category from this many times the largest distance that is to be expected of an image of it
# (docs/decisions.md).
_LIMIT = 2.2

# With fewer images beyond one of each category, nothing is known of how far others lie.
_ENOUGH = 8

# Images whose distances are below this are copies of one, which say nothing either.
_SAME = 1e-6

# Of the mean variance over the channels, so that a channel that hardly varies is not all that counts.
_FLOOR = 1e-2

# Relative error of features in bfloat16, which runtimes choose by themselves: a large channel that hardly varies would
# make every image unlike all.
_ROUNDING = 2.0**-8

# The spread of a product of which one image is known, over that between the products.
_UNKNOWN_SPREAD = 0.1


class CategoryPrediction(NamedTuple):
    """anomalib's ``InferenceBatch`` with ``category``: the index of each image's category, or -1, shape (B,)."""

    pred_score: torch.Tensor | None = None
    pred_label: torch.Tensor | None = None
    anomaly_map: torch.Tensor | None = None
    pred_mask: torch.Tensor | None = None
    category: torch.Tensor | None = None


class CategoryRecognizer(nn.Module):
    r"""Finds the category whose images an image resembles most.

    An image is described by the mean of each of the encoder's feature maps over the image. A category is the mean
    :math:`\mu_c` of its images' descriptors, and :math:`\sigma^2` is the variance within the categories, by channel.
    The category of an image is :math:`\arg\min_c \mathrm{mean}((d - \mu_c)^2 / \sigma^2)`; it is unlike all of them if
    that distance is above a limit, which the images that the categories were learned from set.

    Before :meth:`learn`, or a state dict, it has no categories, and every image is unlike all.

    Example:
        >>> recognizer = CategoryRecognizer()
        >>> nuts, bolts = torch.randn(8, 4), 100 + torch.randn(8, 4)
        >>> recognizer.learn({"bolt": bolts, "nut": nuts})
        >>> recognizer([nuts[:2, None], ]).tolist()
        [1, 1]
    """

    means: torch.Tensor
    precision: torch.Tensor
    limit: torch.Tensor
    encoded_names: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        #: Names of the categories, by index.
        self.names: list[str] = []
        self.register_buffer("means", torch.empty(0, 0))
        self.register_buffer("precision", torch.empty(0))
        self.register_buffer("limit", torch.tensor(float("inf")))
        # A state dict of tensors alone: programs that average or copy weights expect nothing else.
        self.register_buffer("encoded_names", encode_names([]))

    @staticmethod
    def describe(features: Features) -> torch.Tensor:
        """Compute float32 descriptors (B, sum of dims) of feature maps, each (B, N, dim) or (B, dim, rows, columns)."""
        maps = features.values() if isinstance(features, Mapping) else features
        means = [value.float().mean(dim=1 if value.ndim == 3 else (2, 3)) for value in maps]
        return torch.cat(means, dim=1)

    @torch.no_grad()
    def learn(self, descriptors: Mapping[str, torch.Tensor]) -> None:
        """Replace the categories, given descriptors (K, dim) of normal images of each, in the order of their indices.

        Raises:
            ValueError: If a category has no image, or a descriptor is not finite.
        """
        for name, rows in descriptors.items():
            if not len(rows) or not torch.isfinite(rows).all():
                msg = f"the category {name!r} cannot be learned: it needs an image or more, with finite features"
                raise ValueError(msg)
        if gone := [name for name in self.names if name not in descriptors]:
            logger.warning("The data have no %s any more: the model forgets what it knows of it.", ", ".join(gone))
        means = torch.stack([rows.float().mean(0) for rows in descriptors.values()])
        residuals = torch.cat([rows.float() - mean for rows, mean in zip(descriptors.values(), means, strict=True)])
        freedom = len(residuals) - len(means)
        if freedom:
            variance = residuals.square().sum(0) / freedom
        elif len(means) > 1:
            variance = _UNKNOWN_SPREAD**2 * means.var(0)
        else:
            variance = torch.ones_like(means[0])
        variance = variance + _FLOOR * variance.mean() + (_ROUNDING * means).square().amax(0)
        variance = variance + torch.finfo(torch.float32).tiny
        counts = torch.cat([torch.full((len(rows),), len(rows)) for rows in descriptors.values()]).to(variance)
        # A new image is further from the mean of some than these are themselves.
        distances = (residuals.square() / variance).mean(-1) * (counts + 1) / (counts - 1).clamp(min=1)
        largest = float(distances.max())
        limit = _LIMIT * largest if freedom >= _ENOUGH and largest > _SAME else float("inf")
        self._set(list(descriptors), means, 1 / variance, limit)

    def forward(self, features: Features) -> torch.Tensor:
        """Find the index (B,) of each image's category in :attr:`names`, or -1; feature maps as in :meth:`describe`."""
        return self.known(*self.nearest(self.describe(features)))

    def nearest(self, descriptors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the distance to the nearest category and its index, each (B,), for descriptors (B, dim); 0 if none."""
        if not self.names:
            distance = torch.zeros_like(descriptors[:, 0])
            return distance, distance.long()
        smallest, index = ((descriptors[:, None] - self.means).square() * self.precision).mean(dim=-1).min(dim=1)
        return smallest, index

    def known(self, distance: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Give the index (B,) where the image is like the nearest category, and -1 elsewhere."""
        return torch.where(distance <= self.limit, index, UNKNOWN) if self.names else torch.full_like(index, UNKNOWN)

    def _set(self, names: list[str], means: torch.Tensor, precision: torch.Tensor, limit: float) -> None:
        device = self.means.device
        self.names, self.encoded_names = names, encode_names(names).to(device)
        self.means, self.precision = means.to(device), precision.to(device)
        self.limit.fill_(limit)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the shapes of a state dict."""
        for name in ("means", "precision", "encoded_names"):
            if (saved := state_dict.get(f"{prefix}{name}")) is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.names = decode_names(self.encoded_names)


def encode_names(names: Sequence[str]) -> torch.Tensor:
    """Write names into a tensor of bytes, uint8 of shape (K,)."""
    return torch.tensor(list(json.dumps(list(names)).encode()), dtype=torch.uint8)


def decode_names(encoded: torch.Tensor) -> list[str]:
    """Read the names from a tensor of :func:`encode_names`."""
    return json.loads(bytes(encoded.tolist()))
