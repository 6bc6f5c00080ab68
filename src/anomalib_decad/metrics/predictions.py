# SPDX-License-Identifier: Apache-2.0
"""What metrics and callbacks read of the batches of predictions, and of the post-processor that decided on them."""

from dataclasses import fields, replace
from typing import Any, Literal, TypeVar

import torch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Trainer
from torch.utils.data import DistributedSampler

__all__ = [
    "categories_of",
    "gather",
    "lacks_threshold",
    "num_own_images",
    "own_images",
    "raw_maps_of",
    "raw_scores_of",
]

T = TypeVar("T")


def raw_scores_of(batch: Any) -> torch.Tensor | None:
    """Give the image scores of a batch as the model gave them.

    anomalib's post-processor normalizes scores in place and clips them to [0, 1]: whatever is far from the threshold
    becomes equal. This package's models, and its ``CategoryPostProcessor`` beside any model, keep them in the field
    ``raw_score``.

    Returns:
        torch.Tensor | None: ``raw_score``, or else ``pred_score``, or else the maxima of the anomaly maps, B values;
            ``None`` where there is none of them.
    """
    for name in ("raw_score", "pred_score"):
        if (score := getattr(batch, name, None)) is not None:
            return score
    maps = getattr(batch, "anomaly_map", None)
    return None if maps is None else maps.flatten(1).amax(1)


def raw_maps_of(batch: Any) -> torch.Tensor | None:
    """Give the anomaly maps of a batch as the model gave them, see :func:`raw_scores_of`."""
    maps = getattr(batch, "raw_map", None)
    return getattr(batch, "anomaly_map", None) if maps is None else maps


def categories_of(trainer: Trainer, batch: Any) -> list[str]:
    """Name the category of each image: the batch knows it, or the datamodule has one; else it is ``"all"``."""
    datamodule = getattr(trainer, "datamodule", None)
    only = getattr(datamodule, "category", None) or getattr(datamodule, "name", None) or "all"
    return getattr(batch, "category", None) or [only] * len(batch.image)


def gather(value: T) -> list[T]:
    """Gather a picklable value of each process, in the order of their ranks; this one's outside a distributed run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    gathered = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def num_own_images(trainer: Trainer, batch_size: int, batch_idx: int, dataloader_idx: int = 0) -> int:
    """Count the images of an evaluated batch that no other process counts: all of them, or all but the last.

    Lightning gives all processes as many images, as they wait for each other. Where the number of images cannot be
    divided, the last image of some processes is one of another's.
    """
    if trainer.world_size == 1:
        return batch_size
    loaders: Any = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    loader = loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if not isinstance(sampler, DistributedSampler) or batch_idx != len(loader) - 1:
        return batch_size
    place = (sampler.num_samples - 1) * sampler.num_replicas + sampler.rank
    return batch_size - (place >= len(sampler.dataset))  # type: ignore[arg-type]


def own_images(trainer: Trainer, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
    """Leave out of a batch what another process counts, see :func:`num_own_images`; ``None`` if nothing is left."""
    size = len(batch.image)
    count = num_own_images(trainer, size, batch_idx, dataloader_idx)
    if count == size:
        return batch
    if not count:
        return None
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    own = replace(batch, **{name: value[:-1] for name, value in values.items() if value is not None})
    for name in ("raw_score", "raw_map"):
        if hasattr(batch, name):
            setattr(own, name, getattr(batch, name)[:-1])
    return own


def lacks_threshold(post_processor: Any, kind: Literal["image", "pixel"] = "image") -> bool:
    """Tell whether one of anomalib's post-processors has seen no validation: its labels, or its masks, mean nothing."""
    return isinstance(post_processor, PostProcessor) and bool(getattr(post_processor, f"{kind}_threshold").isnan())
