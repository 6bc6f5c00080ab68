# SPDX-License-Identifier: Apache-2.0
"""Exchange of metric state between the processes of a distributed run."""

from typing import TypeVar

import torch

__all__ = ["gather"]

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Gather a picklable value of each process.

    Args:
        value (T): This process's value.

    Returns:
        list[T]: The values of all processes in the order of their ranks; only this one's outside a distributed run.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    gathered = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered
