# SPDX-License-Identifier: Apache-2.0
"""Who of a trainer's callbacks sees a batch first."""

from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, Trainer

__all__ = ["put_before_post_processor", "put_last"]


def put_before_post_processor(trainer: Trainer, callback: Callback) -> None:
    """Have a callback see the predictions of a batch before the post-processor changes them in place.

    Args:
        trainer (Trainer): The trainer, in ``setup``.
        callback (Callback): The callback, which may be among those of the trainer. Without a post-processor it comes
            first.
    """
    others = _without(trainer, callback)
    place = next((index for index, other in enumerate(others) if isinstance(other, PostProcessor)), 0)
    # A new list: Lightning is iterating over the old one.
    trainer.callbacks = [*others[:place], callback, *others[place:]]  # type: ignore[attr-defined]


def put_last(trainer: Trainer, callback: Callback) -> None:
    """Have a callback see a batch when all others have seen it.

    Args:
        trainer (Trainer): The trainer, in ``setup``.
        callback (Callback): The callback, which may be among those of the trainer.
    """
    trainer.callbacks = [*_without(trainer, callback), callback]  # type: ignore[attr-defined]


def _without(trainer: Trainer, callback: Callback) -> list[Callback]:
    return [other for other in trainer.callbacks if other is not callback]  # type: ignore[attr-defined]
