# SPDX-License-Identifier: Apache-2.0
"""Groups of arguments of the components that belong together, each documented here and nowhere else.

Models take them whole, and the command line shows their fields: ``--model.synthesis.num_steps 3``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from anomalib_decad.ranges import check_range

__all__ = ["DecouplerOptions", "DecouplingLossOptions", "InvertibleOptions", "SynthesisOptions", "as_options"]

Options = TypeVar("Options")


@dataclass(frozen=True)
class InvertibleOptions:
    """Shape of the invertible network.

    Args:
        num_blocks (int): Number of blocks R.
            Defaults to ``3``, as in DecAD's supplement.
        num_units (int): Units in a block, K.
            Defaults to ``2``, as in DecAD's supplement.
        hidden_dim (int): Channels inside a unit, which changes its input within a subspace of this dimension.
            Defaults to ``64``.
        lipschitz (float): Bound of the Lipschitz constant of a unit's network G, in (0, 1): larger is more expressive,
            smaller needs fewer solver iterations.
            Defaults to ``0.9``.
        pila_k (float): Sharpness of the activation Pila, positive.
            Defaults to ``5.0``, as in DecAD's supplement.

    Raises:
        ValueError: If a value is out of its range.
    """

    num_blocks: int = 3
    num_units: int = 2
    hidden_dim: int = 64
    lipschitz: float = 0.9
    pila_k: float = 5.0

    def __post_init__(self) -> None:
        for name in ("num_blocks", "num_units", "hidden_dim"):
            check_range(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        check_range(0 < self.lipschitz < 1, "lipschitz", "between 0 and 1 (both excluded)", self.lipschitz)
        check_range(self.pila_k > 0, "pila_k", "positive", self.pila_k)


@dataclass(frozen=True)
class DecouplerOptions:
    """How the latent is split, and the prior that takes the place of its abnormal component.

    Args:
        abnormal_fraction (float): Share of the latent channels that hold the abnormal component, in (0, 1).
            Defaults to ``0.9``.
        num_prototypes (int): Prototypes of normal patches in the prior; 0 for a prior of 0, the same for all patches.
            Defaults to ``5120``.
        prior_dim (int): Channels inside the small network that refines the prototypes; 0 leaves it out.
            Defaults to ``256``.
        image_prior (bool): Whether the prior also looks at other normal patches of the same image. Only DecAD has it.
            Defaults to ``True``.

    Raises:
        ValueError: If a value is out of its range.
    """

    abnormal_fraction: float = 0.9
    num_prototypes: int = 5120
    prior_dim: int = 256
    image_prior: bool = True

    def __post_init__(self) -> None:
        check_range(0 < self.abnormal_fraction < 1, "abnormal_fraction", "between 0 and 1", self.abnormal_fraction)
        check_range(self.num_prototypes >= 0, "num_prototypes", "at least 0", self.num_prototypes)
        check_range(self.prior_dim >= 0, "prior_dim", "at least 0", self.prior_dim)


@dataclass(frozen=True)
class SynthesisOptions:
    """What synthetic anomalies are like, beside their radius delta.

    Args:
        fraction (float): Share of a batch's images that have perturbed patches, in [0, 1]; rounded, at least one image
            unless 0.
            Defaults to ``0.5``.
        num_steps (int): Gradient steps that make an anomaly hard to see; 0 for its random start.
            Defaults to ``1``.
        noise (Literal["features", "gaussian"]): Where it starts: at a difference of two patches of the batch, as
            features vary, or at Gaussian noise, which is seen at once.
            Defaults to ``"features"``.
        blob_size (int): About how many patches wide it is; 1 scatters the perturbed patches.
            Defaults to ``4``.

    Raises:
        ValueError: If a value is out of its range.
    """

    fraction: float = 0.5
    num_steps: int = 1
    noise: Literal["features", "gaussian"] = "features"
    blob_size: int = 4

    def __post_init__(self) -> None:
        check_range(0 <= self.fraction <= 1, "fraction", "in [0, 1]", self.fraction)
        check_range(self.num_steps >= 0, "num_steps", "at least 0", self.num_steps)
        check_range(self.noise in {"features", "gaussian"}, "noise", "'features' or 'gaussian'", repr(self.noise))
        check_range(self.blob_size >= 1, "blob_size", "at least 1", self.blob_size)


@dataclass(frozen=True)
class DecouplingLossOptions:
    """Weights of the losses that train the decoupling, beside that of the reconstruction, which is 1.

    A term of weight 0 is not computed.

    Args:
        prior_weight (float): Weight of the prior's distance from the abnormal components of normal patches.
            Defaults to ``1.0``.
        normal_weight (float): Weight of the abnormal energy of normal patches.
            Defaults to ``0.0``.
        abnormal_weight (float): Weight of the hinge of perturbed patches.
            Defaults to ``0.0``.
        restoration_weight (float): Weight of what has removal restore the embeddings before perturbation.
            Defaults to ``0.0``.
        margin (float): Abnormal energy that a perturbed patch should have, positive.
            Defaults to ``1.0``.

    Raises:
        ValueError: If a value is out of its range.
    """

    prior_weight: float = 1.0
    normal_weight: float = 0.0
    abnormal_weight: float = 0.0
    restoration_weight: float = 0.0
    margin: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.margin > 0, "margin", "positive", self.margin)
        for name in ("prior_weight", "normal_weight", "abnormal_weight", "restoration_weight"):
            check_range(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))


def as_options(cls: type[Options], value: Options | Mapping[str, Any]) -> Options:
    """Make a group of arguments of what a checkpoint has.

    Args:
        cls (type[Options]): The group.
        value (Options | Mapping[str, Any]): The group, or its fields by name.

    Returns:
        Options: The group.

    Raises:
        ValueError: If a value is out of its range.
    """
    return cls(**value) if isinstance(value, Mapping) else value
