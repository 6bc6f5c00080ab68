# SPDX-License-Identifier: Apache-2.0
"""Groups of arguments of the components that belong together, each documented here and nowhere else.

Models take them whole, and the command line shows their fields: ``--model.synthesis.num_steps 3``. A value that is out
of its range raises a ValueError.
"""

from dataclasses import dataclass
from typing import Literal

from anomalib_decad.ranges import check_range

__all__ = ["DecouplerOptions", "DecouplingLossOptions", "InvertibleOptions", "SynthesisOptions"]


def _check_smallest(options: object, smallest: float, *names: str) -> None:
    for name in names:
        check_range(getattr(options, name) >= smallest, name, f"at least {smallest}", getattr(options, name))


@dataclass(frozen=True)
class InvertibleOptions:
    """Shape of the invertible network.

    Args:
        num_blocks (int): Blocks R. Defaults to ``3``, as in DecAD's supplement.
        num_units (int): Units K in a block. Defaults to ``2``, as in DecAD's supplement.
        hidden_dim (int): Channels inside a unit, which changes its input within a subspace of this dimension. Defaults
            to ``64``.
        lipschitz (float): Bound of the Lipschitz constant of a unit's network G, in (0, 1): larger is more expressive,
            smaller needs fewer solver iterations. Defaults to ``0.9``.
        pila_k (float): Sharpness of the activation Pila, positive. Defaults to ``5.0``, as in DecAD's supplement.
    """

    num_blocks: int = 3
    num_units: int = 2
    hidden_dim: int = 64
    lipschitz: float = 0.9
    pila_k: float = 5.0

    def __post_init__(self) -> None:
        _check_smallest(self, 1, "num_blocks", "num_units", "hidden_dim")
        check_range(0 < self.lipschitz < 1, "lipschitz", "between 0 and 1 (both excluded)", self.lipschitz)
        check_range(self.pila_k > 0, "pila_k", "positive", self.pila_k)


@dataclass(frozen=True)
class DecouplerOptions:
    """How the latent is split, and the prior that takes the place of its abnormal component.

    Args:
        abnormal_fraction (float): Share of the latent channels that hold the abnormal component, in (0, 1). Defaults to
            ``0.9``.
        num_prototypes (int): Normal patches of each product that are kept as prototypes; 0 for a prior of 0, as in the
            paper, which alone lets the invertible network learn. Defaults to ``16384``.
        num_neighbors (int): Nearest prototypes that a patch looks at; at least 1. Defaults to ``8``.
    """

    abnormal_fraction: float = 0.9
    num_prototypes: int = 16_384
    num_neighbors: int = 8

    def __post_init__(self) -> None:
        check_range(0 < self.abnormal_fraction < 1, "abnormal_fraction", "between 0 and 1", self.abnormal_fraction)
        _check_smallest(self, 0, "num_prototypes")
        _check_smallest(self, 1, "num_neighbors")


@dataclass(frozen=True)
class SynthesisOptions:
    """Options of synthetic anomalies, beside their radius delta.

    Args:
        fraction (float): Share of a batch's images with perturbed patches, in [0, 1]; rounded, at least one image
            unless 0, for which there are none, at no cost. Defaults to ``0.0``.
        num_steps (int): Gradient steps that make an anomaly hard to see; 0 for its random start. Defaults to ``1``.
        noise (Literal["features", "gaussian"]): Random start: a difference of two patches of the batch, as features
            vary, or Gaussian noise, which is easy to see. Defaults to ``"features"``.
        blob_size (int): Width of an anomaly in patches, about; 1 scatters the perturbed patches. Defaults to ``4``.
    """

    fraction: float = 0.0
    num_steps: int = 1
    noise: Literal["features", "gaussian"] = "features"
    blob_size: int = 4

    def __post_init__(self) -> None:
        check_range(0 <= self.fraction <= 1, "fraction", "in [0, 1]", self.fraction)
        _check_smallest(self, 0, "num_steps")
        check_range(self.noise in {"features", "gaussian"}, "noise", "'features' or 'gaussian'", repr(self.noise))
        _check_smallest(self, 1, "blob_size")


@dataclass(frozen=True)
class DecouplingLossOptions:
    """Weights of the losses that train the decoupling where its prior is 0, beside that of the reconstruction, 1.

    A term of weight 0 is not computed.

    Args:
        normal_weight (float): Of the abnormal energy of normal patches. Defaults to ``0.0``.
        abnormal_weight (float): Of the hinge of perturbed patches. Defaults to ``0.0``.
        restoration_weight (float): Of the error with which removal restores perturbed embeddings. Defaults to ``0.0``.
        margin (float): Abnormal energy that a perturbed patch should have, positive. Defaults to ``1.0``.
    """

    normal_weight: float = 0.0
    abnormal_weight: float = 0.0
    restoration_weight: float = 0.0
    margin: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.margin > 0, "margin", "positive", self.margin)
        _check_smallest(self, 0, "normal_weight", "abnormal_weight", "restoration_weight")
