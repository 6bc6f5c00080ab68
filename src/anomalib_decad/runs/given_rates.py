# SPDX-License-Identifier: Apache-2.0
"""Learning rates and weight decay that are given to a training that is resumed."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["GivenRates"]


class GivenRates(Callback):
    """Has a resumed training go on with the model's own rates.

    Lightning restores the optimizer and its scheduler, and with them the rates of the checkpoint. What the scheduler
    has made of a rate so far is kept in proportion. Equal rates stay as they are.
    """

    def __init__(self) -> None:
        # Of each optimizer, of each group of parameters: the learning rate at its start and the weight decay.
        self._given: list[list[tuple[float, float]]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the rates that the model has given to its optimizers, before a checkpoint's are restored."""
        del pl_module
        self._given = [
            [(_start_of(group), group.get("weight_decay", 0.0)) for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put them back."""
        del pl_module
        if len(self._given) != len(trainer.optimizers):
            return  # a strategy that makes its optimizers later
        for optimizer, given in zip(trainer.optimizers, self._given, strict=True):
            for group, (rate, decay) in zip(optimizer.param_groups, given, strict=True):
                if (restored := _start_of(group)) != rate and restored:
                    group["lr"] *= rate / restored
                    group["initial_lr"] = rate
                if "weight_decay" in group:
                    group["weight_decay"] = decay
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [_start_of(group) for group in scheduler.optimizer.param_groups]


def _start_of(group: dict[str, Any]) -> float:
    """Give the learning rate that a schedule starts from."""
    return float(group.get("initial_lr", group["lr"]))
