# SPDX-License-Identifier: Apache-2.0
"""Prior of the abnormal component of a normal patch, given its normal component."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from anomalib_decad.components.whitening import at_least_float32
from anomalib_decad.ranges import check_range

__all__ = ["PrototypePrior", "Prototypes"]

# A neighbor's weight falls by this power of e from a distance of 0 to that of the furthest neighbor.
_SHARPNESS = 4.0

# Added to the squared distances of what is no neighbor: patches of the image itself, and the empty places of a product
# that has fewer prototypes than others. Where there is nothing else, patches of the image itself come first.
_OWN, _EMPTY = 1e6, 1e9

_TINY = 1e-12


class Prototypes(NamedTuple):
    """Normal patches of one product in the latent space."""

    #: Normal components, shape (K, num_normal).
    normal: torch.Tensor
    #: Abnormal components, shape (K, num_abnormal).
    abnormal: torch.Tensor
    #: The image that each is of, a row of ``descriptors``, shape (K,).
    image: torch.Tensor
    #: What the images are recognized by, shape (I, D).
    descriptors: torch.Tensor


class PrototypePrior(nn.Module):
    r"""Expects the abnormal component of a normal patch from prototypes, normal patches of the same product.

    .. math::
        p(z_n) = \sum_{i \in N(z_n)} w_i a_i, \qquad w = \mathrm{softmax}(-4 \|z_n - k_i\|^2 / \max_j \|z_n - k_j\|^2)

    over the nearest prototypes N, with their normal components :math:`k_i` and abnormal components :math:`a_i`. Nothing
    of the abnormal component itself enters, so an anomaly in it cannot be copied. An image looks at the prototypes of
    its own product only: what it costs does not depend on the number of products. An image that prototypes were taken
    from can be left out, as it would explain itself.

    Prototypes are kept in half precision.

    Args:
        num_normal (int): Channels of the normal component; at least 1.
        num_abnormal (int): Channels of the abnormal component; at least 1.
        num_neighbors (int): Prototypes that a patch looks at; at least 1. Defaults to ``8``.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> prior = PrototypePrior(num_normal=8, num_abnormal=24)
        >>> patches = Prototypes(torch.randn(50, 8), torch.randn(50, 24), torch.zeros(50).long(), torch.randn(1, 4))
        >>> prior.set([patches])
        >>> prior(torch.randn(2, 100, 8), torch.tensor([0, 0])).shape
        torch.Size([2, 100, 24])
    """

    keys: torch.Tensor
    norms: torch.Tensor
    values: torch.Tensor
    image: torch.Tensor
    descriptors: torch.Tensor

    def __init__(self, num_normal: int, num_abnormal: int, num_neighbors: int = 8) -> None:
        super().__init__()
        sizes = {"num_normal": num_normal, "num_abnormal": num_abnormal, "num_neighbors": num_neighbors}
        for name, value in sizes.items():
            check_range(value >= 1, name, "at least 1", value)
        self.num_neighbors = num_neighbors
        # Of one product with nothing to look at, until some are set. Keys lie as the product of matrices needs them.
        self.register_buffer("keys", torch.zeros(1, num_normal, num_neighbors, dtype=torch.float16))
        self.register_buffer("norms", torch.full((1, num_neighbors), _EMPTY))
        self.register_buffer("values", torch.zeros(1, num_neighbors, num_abnormal, dtype=torch.float16))
        self.register_buffer("image", torch.full((1, num_neighbors), -1, dtype=torch.int32))
        self.register_buffer("descriptors", torch.empty(0, 0))

    @torch.no_grad()
    def set(self, products: Sequence[Prototypes]) -> None:
        """Replace the prototypes, given those of each product in the order of their indices; at least one product."""
        size = max(self.num_neighbors, *(len(product.normal) for product in products))
        keys = self.keys.new_zeros(len(products), self.keys.shape[1], size)
        values = self.values.new_zeros(len(products), size, self.values.shape[2])
        norms = self.norms.new_full((len(products), size), _EMPTY)
        image = self.image.new_full((len(products), size), -1)
        first = 0
        for row, product in enumerate(products):
            count = len(product.normal)
            keys[row, :, :count], values[row, :count] = product.normal.T, product.abnormal
            norms[row, :count] = keys[row, :, :count].float().square().sum(0)
            image[row, :count] = product.image + first
            first += len(product.descriptors)
        self.keys, self.norms, self.values, self.image = keys, norms, values, image
        self.descriptors = torch.cat([product.descriptors for product in products]).to(self.norms)

    def of(self, product: int) -> Prototypes:
        """Give the prototypes of a product."""
        rows = self.image[product] >= 0
        images, image = self.image[product, rows].unique(return_inverse=True)
        return Prototypes(
            self.keys[product][:, rows].T, self.values[product, rows], image, self.descriptors[images.long()]
        )

    def find_images(self, descriptors: torch.Tensor) -> torch.Tensor:
        """Find the images (B,) that prototypes were taken from which are most like those of descriptors (B, D)."""
        return torch.cdist(descriptors.to(self.descriptors), self.descriptors).argmin(1)

    def forward(self, normal: torch.Tensor, product: torch.Tensor, without: torch.Tensor | None = None) -> torch.Tensor:
        """Expect the abnormal components of patches.

        Args:
            normal (torch.Tensor): Their normal components, shape (B, N, num_normal).
            product (torch.Tensor): Index of the product of each image, shape (B,).
            without (torch.Tensor | None): Image whose prototypes are not looked at, of :meth:`find_images`, shape (B,).
                Defaults to ``None``: all are.

        Returns:
            torch.Tensor: Shape (B, N, num_abnormal), in float32 or wider.
        """
        with torch.autocast(normal.device.type, enabled=False):  # differences between large numbers
            normal = at_least_float32(normal)
            offset = self.norms[product]
            if without is not None:
                offset = offset + _OWN * (self.image[product] == without[:, None])
            # |z_n|^2 is the same for all prototypes: the nearest are found without. One product of matrices, as what
            # else passes over patches times prototypes takes as long.
            keys = torch.cat([self.keys[product].to(normal.dtype), offset.to(normal.dtype).unsqueeze(1)], dim=1)
            query = torch.cat([-2 * normal, torch.ones_like(normal[..., :1])], dim=-1)
            distance, index = (query @ keys).topk(self.num_neighbors, dim=-1, largest=False)
            distance = (distance + normal.square().sum(-1, keepdim=True)).clamp(min=0)
            weights = (-_SHARPNESS * distance / distance.amax(-1, keepdim=True).clamp(min=_TINY)).softmax(-1)
            values = self.values.flatten(0, 1)[index + product[:, None, None] * self.keys.shape[2]]
            return (weights.unsqueeze(-2) @ values.to(normal.dtype)).squeeze(-2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the shapes of a state dict."""
        for name in ("keys", "norms", "values", "image", "descriptors"):
            if (saved := state_dict.get(f"{prefix}{name}")) is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
