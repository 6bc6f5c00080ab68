# SPDX-License-Identifier: Apache-2.0
"""Parameters of a model for an optimizer."""

from typing import Any

from torch import nn

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module, part: nn.Module | None, learning_rate: float, part_learning_rate: float
) -> list[dict[str, Any]]:
    """Give the parameters to train to an optimizer, those of a part with a learning rate of their own.

    Args:
        model (nn.Module): The model.
        part (nn.Module | None): The part of it, if it has it.
        learning_rate (float): Learning rate of all others.
        part_learning_rate (float): Learning rate of the part.

    Returns:
        list[dict[str, Any]]: Parameter groups: all others, and the part if there is one.
    """
    own = [p for p in part.parameters() if p.requires_grad] if part else []
    known = set(own)
    others = [p for p in model.parameters() if p.requires_grad and p not in known]
    groups = [{"params": others, "lr": learning_rate}]
    return [*groups, {"params": own, "lr": part_learning_rate}] if own else groups
