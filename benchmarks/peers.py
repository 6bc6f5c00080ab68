# SPDX-License-Identifier: Apache-2.0
"""DecAD and the peers from anomalib, with the same encoder and image size where the method allows."""

from __future__ import annotations

from typing import cast

import torch
from anomalib.models import AnomalibModule, AnomalyDINO, Dinomaly, InpFormer, Patchcore, Rad
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_decad import DecAD, DecADModel, DecoupledMambaAD, DecoupledReverseDistillation, DecoupledUniAD
from anomalib_decad.components import Decoupler, PrototypePrior, Prototypes, sample_patches
from nearest_neighbor import NearestNeighbor

__all__ = ["DECOUPLED", "MODELS", "create", "prepare"]

MODELS = ("DecAD", "Dinomaly", "InpFormer", "Rad", "Patchcore", "AnomalyDINO", "NearestNeighbor")

#: Methods that can be decoupled, by their names with and without it.
DECOUPLED = {
    **{cls.__name__: (cls, True) for cls in (DecoupledReverseDistillation, DecoupledUniAD, DecoupledMambaAD)},
    "ReverseDistillation": (DecoupledReverseDistillation, False),
    "UniAD": (DecoupledUniAD, False),
    "MambaAD": (DecoupledMambaAD, False),
}

# Of the encoder, counted from 1, where a method is not bound to others.
_LAYERS = (3, 6, 9)


def create(name: str, encoder: str, size: int, **kwargs: object) -> AnomalibModule:
    """Create a model with its own defaults but for encoder and image size.

    Args:
        name (str): One of :data:`MODELS` or :data:`DECOUPLED`.
        encoder (str): A DINOv2 of timm.
        size (int): Side of the square images in pixels.
        **kwargs (object): Further arguments of the model.

    Returns:
        AnomalibModule: The model.
    """
    if name == "DecAD":
        return DecAD(encoder=encoder, image_size=(size, size), **kwargs)
    if name in DECOUPLED:
        cls, decouple = DECOUPLED[name]
        return cls(encoder=encoder, image_size=(size, size), decouple=decouple, **kwargs)
    pre_processor = PreProcessor(
        Compose(
            [
                Resize((size, size), antialias=True),
                Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
            ]
        )
    )
    kwargs["pre_processor"] = pre_processor
    if name == "Dinomaly":
        return Dinomaly(encoder_name=encoder, **kwargs)
    if name == "InpFormer":
        return InpFormer(encoder_name=encoder, **kwargs)
    if name == "AnomalyDINO":
        return AnomalyDINO(encoder_name=encoder, **kwargs)
    if name == "Rad":
        return Rad(backbone=encoder, **kwargs)
    if name == "NearestNeighbor":
        return NearestNeighbor(encoder=encoder, layers=_LAYERS, **kwargs)
    if name == "Patchcore":
        return Patchcore(backbone=encoder, layers=[f"blocks.{layer - 1}" for layer in _LAYERS], **kwargs)
    msg = f"no model {name}; there are {', '.join((*MODELS, *DECOUPLED))}"
    raise ValueError(msg)


@torch.no_grad()
def prepare(model: DecADModel, images: torch.Tensor, num_products: int = 15) -> None:
    """Initialize a model by random images, with as many prototypes of each product as it may have.

    Args:
        model (DecADModel): The model.
        images (torch.Tensor): Images of shape (B, 3, H, W), B at least 2.
        num_products (int): Products that it has prototypes of.
    """
    sample = sample_patches([model.encoder(images)], len(images), 400)
    model.recognizer.learn({str(index): index + sample.descriptors for index in range(num_products)})
    decoupler = cast("Decoupler", model.decoupler)
    prior = cast("PrototypePrior", decoupler.prior)

    def products() -> list[Prototypes]:
        size = decoupler.num_prototypes
        parts = torch.randn(size, prior.keys.shape[1]), torch.randn(size, decoupler.num_abnormal)
        return [Prototypes(*parts, torch.arange(size) % len(images), sample.descriptors)] * num_products

    model.train().initialize(sample, products)
