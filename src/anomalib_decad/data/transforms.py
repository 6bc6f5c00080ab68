# SPDX-License-Identifier: Apache-2.0
"""What a model's pre-processor does to an image."""

from typing import Any

from lightning.pytorch import LightningModule

__all__ = ["sees_whole_images", "steps_of"]


def steps_of(pl_module: LightningModule) -> list[Any]:
    """List the steps of a model's transform.

    Args:
        pl_module (LightningModule): The model.

    Returns:
        list[Any]: The transforms, those that are made of others and their parts; ``None`` where there is none.
    """
    todo, steps = [getattr(getattr(pl_module, "pre_processor", None), "transform", None)], []
    while todo:
        step = todo.pop()
        steps.append(step)
        todo += getattr(step, "transforms", [])
    return steps


def sees_whole_images(pl_module: LightningModule) -> bool:
    """Tell whether a model sees images to their edges, so that places in its maps are places in the files.

    Args:
        pl_module (LightningModule): The model.

    Returns:
        bool: ``False`` if a step of its transform crops.
    """
    return not any("Crop" in type(step).__name__ for step in steps_of(pl_module))
