# SPDX-License-Identifier: Apache-2.0
"""Images that two processes of a distributed evaluation have."""

from dataclasses import fields, replace
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DistributedSampler

__all__ = ["num_own_images", "without_repeated"]


def num_own_images(trainer: Trainer, batch_size: int, batch_idx: int, dataloader_idx: int = 0) -> int:
    """Count the images of a validation's or test's batch that no other process counts.

    Lightning gives all processes as many images, as they wait for each other. Where the number of images cannot be
    divided, the last image of some processes is one of another's.

    Args:
        trainer (Trainer): The trainer.
        batch_size (int): Number of images in the batch.
        batch_idx (int): Number of the batch.
        dataloader_idx (int): Number of its dataloader.
            Defaults to ``0``.

    Returns:
        int: ``batch_size``, or one less: the last one is not this process's own.
    """
    if trainer.world_size == 1:
        return batch_size
    loaders: Any = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    loader = loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if not isinstance(sampler, DistributedSampler) or batch_idx != len(loader) - 1:
        return batch_size
    place = (sampler.num_samples - 1) * sampler.num_replicas + sampler.rank
    return batch_size - (place >= len(sampler.dataset))  # type: ignore[arg-type]


def without_repeated(trainer: Trainer, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
    """Leave out of a batch what another process counts, see :func:`num_own_images`.

    Args:
        trainer (Trainer): The trainer.
        batch (Any): A batch of anomalib's, of a validation or test.
        batch_idx (int): Its number.
        dataloader_idx (int): Number of its dataloader.
            Defaults to ``0``.

    Returns:
        Any: The batch, one without its last image, or ``None`` where it had no other.
    """
    size = len(batch.image)
    count = num_own_images(trainer, size, batch_idx, dataloader_idx)
    if count == size:
        return batch
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return (
        replace(batch, **{name: value[:-1] for name, value in values.items() if value is not None}) if count else None
    )
