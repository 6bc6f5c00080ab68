# SPDX-License-Identifier: Apache-2.0
"""What checkpoints of the package's models hold, and what they fit with."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from anomalib.models.components import AnomalibModule
from typing_extensions import Self

__all__ = ["CheckpointMixin"]

_RNG_KEY = "anomalib_decad_rng"

#: Changes when a checkpoint of before no longer fits.
_FORMAT_KEY, _FORMAT = "anomalib_decad_format", 1

if TYPE_CHECKING:
    _Base = AnomalibModule
else:
    _Base = object


class CheckpointMixin(_Base):
    """Keeps in a checkpoint what a resumed training needs, and refuses checkpoints that do not fit."""

    #: Arguments that a checkpoint only fits with; a dot leads into a group.
    shape_arguments: ClassVar[tuple[str, ...]] = ()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the random number generators, so that a resumed run goes on as an unbroken one.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint[_FORMAT_KEY] = _FORMAT
        checkpoint[_RNG_KEY] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint[_RNG_KEY]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and restore the random number generators if a fit is resumed.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.

        Raises:
            ValueError: If the checkpoint is of another version, or of a model of other shape; the message names the
                arguments to give.
        """
        found = checkpoint.get(_FORMAT_KEY)
        if found != _FORMAT:
            msg = (
                f"the checkpoint is of another version of anomalib-decad (format {found or 'unknown'}, this version "
                f"reads {_FORMAT}): train again, or install the version that it was trained with"
            )
            raise ValueError(msg)
        mine, theirs = self.hparams, checkpoint.get("hyper_parameters", {})
        different = []
        for name in self.shape_arguments:
            value, other = _value_of(mine, name), _value_of(theirs, name)
            if _MISSING not in (value, other) and value != other:
                different.append(f"{name} {other}")
        if different:
            flags = " ".join(f"--model.{item}" for item in different)
            msg = f"the checkpoint is of a {type(self).__name__} of another shape: give it the arguments {flags}"
            raise ValueError(msg)
        super().on_load_checkpoint(checkpoint)
        # Before the dataloaders draw their seeds, as when the checkpoint was saved.
        if self._trainer is not None and self.trainer.training and _RNG_KEY in checkpoint:
            torch.set_rng_state(checkpoint[_RNG_KEY]["cpu"].cpu())
            device = self.trainer.strategy.root_device
            if device.type == "cuda" and "cuda" in checkpoint[_RNG_KEY]:
                torch.cuda.set_rng_state(checkpoint[_RNG_KEY]["cuda"].cpu(), device)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a model from a checkpoint, which has all weights: neither the hub nor a weights file is needed.

        Args:
            checkpoint_path (str | Path): The checkpoint.
            *args (Any): Arguments of ``AnomalibModule.load_from_checkpoint``.
            **kwargs (Any): Arguments of ``AnomalibModule.load_from_checkpoint``, and overriding model arguments.

        Returns:
            Self: The model.
        """
        kwargs.setdefault("encoder_weights", None)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)  # type: ignore[return-value]


_MISSING = object()


def _value_of(arguments: Mapping[str, Any], name: str) -> Any:
    """Find an argument, or a field of a group of them, so that equal sequences compare equal."""
    group, _, field = name.partition(".")
    value = arguments.get(group, _MISSING)
    if field and isinstance(value, Mapping):
        value = value.get(field, _MISSING)
    return list(value) if isinstance(value, list | tuple) else value
