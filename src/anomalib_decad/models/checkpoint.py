# SPDX-License-Identifier: Apache-2.0
"""What checkpoints of the package's models hold, and what they fit with."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.models.components import AnomalibModule
from typing_extensions import Self

from anomalib_decad.compat import trainer_of
from anomalib_decad.runs import reading

__all__ = ["TRAINING_ARGUMENTS", "CheckpointMixin", "is_group"]

#: Arguments that matter in training alone, or for what a run writes: a checkpoint can be used, and a training resumed,
#: with others. All other arguments are what the model is.
TRAINING_ARGUMENTS = frozenset(
    {
        "cuda_graph", "decoupling_learning_rate", "delta", "encoder_weights", "feature_cache", "feature_cache_dir",
        "feature_cache_limit", "focus", "gradient_clip_val", "jitter", "learning_rate", "loss", "max_steps",
        "save_maps", "synthesis", "warmup_steps", "weight_decay",
    }
)  # fmt: skip

#: Parts of an anomalib model that a user may replace or switch off, and the key of each one's settings in a checkpoint.
_PARTS = {
    "pre_processor": "anomalib_pre_processor_config",
    "post_processor": "anomalib_post_processor_config",
    "evaluator": None,
    "visualizer": None,
}
#: Nothing of these is in a checkpoint but what they were set to.
_FREE = TRAINING_ARGUMENTS | _PARTS.keys() | {"report"}
_ENABLED_KEY = "anomalib_components_enabled"

_RNG_KEY = "anomalib_decad_rng"

#: Changes when a checkpoint of before no longer fits.
_FORMAT_KEY, _FORMAT = "anomalib_decad_format", 4

#: Name of the model's class.
_MODEL_KEY = "anomalib_decad_model"

#: Rates of the optimizer, which a checkpoint has, too: those left at their defaults are taken from there.
_RATES = ("learning_rate", "decoupling_learning_rate", "weight_decay")

if TYPE_CHECKING:
    _Base = AnomalibModule
else:
    _Base = object


class CheckpointMixin(_Base):
    """Keeps in a checkpoint what a resumed training needs, and makes a model of any arguments that of a checkpoint.

    A checkpoint says what its model is: whatever is left at its default is taken from there, and an argument that
    contradicts it is an error. Parts that the user gives or switches off stay as the user wants them.
    """

    #: Parts that are not the default ones, from the model's arguments.
    given_parts: frozenset[str] = frozenset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the random number generators, so that a resumed run goes on as an unbroken one.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.
        """
        super().on_save_checkpoint(checkpoint)
        arguments = checkpoint.get("hyper_parameters", {})
        if "pre_processor" in self.given_parts and "image_size" in arguments and self.input_size:
            # A model may be made for the size, and is made before its pre-processor is there.
            arguments["image_size"] = list(self.input_size)
        checkpoint[_FORMAT_KEY], checkpoint[_MODEL_KEY] = _FORMAT, type(self).__name__
        checkpoint[_RNG_KEY] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint[_RNG_KEY]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Become the checkpoint's model, and restore the random number generators if a fit is resumed.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.

        Raises:
            ValueError: If the checkpoint is of another model or version, its weights are NaN, or an argument
                contradicts it; the message names the arguments.
        """
        _check_model(checkpoint, type(self).__name__)
        weights = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("model.")}
        broken = [name for name, value in weights.items() if value.is_floating_point() and value.isnan().any()]
        if broken:
            msg = f"the checkpoint's weights are damaged: {broken[0]} has NaN. Use a checkpoint of an earlier step"
            raise ValueError(msg)
        self._become(checkpoint.get("hyper_parameters", {}))
        self._keep_given_parts(checkpoint)
        super().on_load_checkpoint(checkpoint)
        # Before the dataloaders draw their seeds, as when the checkpoint was saved.
        trainer = trainer_of(self)
        if trainer is not None and trainer.training and _RNG_KEY in checkpoint:
            torch.set_rng_state(checkpoint[_RNG_KEY]["cpu"].cpu())
            device = trainer.strategy.root_device
            if device.type == "cuda" and "cuda" in checkpoint[_RNG_KEY]:
                torch.cuda.set_rng_state(checkpoint[_RNG_KEY]["cuda"].cpu(), device)

    def _become(self, theirs: Mapping[str, Any]) -> None:
        """Take the arguments of a checkpoint that are not this model's, and its parts from them."""
        every_default = _defaults(type(self))
        for name in _RATES:
            if name in theirs and self.hparams.get(name) == every_default.get(name):
                self.hparams[name] = theirs[name]
                setattr(self, name, theirs[name])
        defaults, mine = _leaves(every_default), _leaves(self.hparams)
        values = {name: value for name, value in _leaves(theirs).items() if name in mine}
        different = {name: value for name, value in values.items() if mine[name] != value}
        if not different:
            return
        arguments = {name: value for name, value in theirs.items() if name not in TRAINING_ARGUMENTS}
        kept = {name: value for name, value in self.hparams.items() if name in TRAINING_ARGUMENTS}
        parts = {"encoder_weights": None, "evaluator": False, "visualizer": False, "report": False}
        with torch.random.fork_rng(devices=[]):
            model = type(self)(**{**kept, **arguments, **parts})
        # Where it is given as the checkpoint's default, as an image of 280 pixels, nothing is contradicted.
        same_size = self.input_size == model.input_size or "pre_processor" in self.given_parts
        wrong = {
            name: value
            for name, value in different.items()
            if mine[name] != defaults.get(name) and not (name == "image_size" and same_size)
        }
        _refuse(type(self), wrong)
        for name, module in model.named_children():
            if name not in _PARTS:
                setattr(self, name, module.train(self.training))
        self.hparams.update(arguments)

    def _keep_given_parts(self, checkpoint: dict[str, Any]) -> None:
        """Leave out of a checkpoint what it says of parts that the user has given or switched off."""
        state = checkpoint["state_dict"]
        enabled = dict(checkpoint.get(_ENABLED_KEY, {}))
        for name in self.given_parts:
            part, key = getattr(self, name), _PARTS[name]
            enabled[name] = part is not None
            if key is not None:
                checkpoint.pop(key, None)
            own = part.state_dict(prefix=f"{name}.") if isinstance(part, torch.nn.Module) else {}
            for entry in [entry for entry in state if entry.startswith(f"{name}.") and entry not in own]:
                del state[entry]
            # A part that was off in training has no thresholds yet.
            for entry, value in own.items():
                state.setdefault(entry, value)
        if enabled:
            checkpoint[_ENABLED_KEY] = enabled

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a model from a checkpoint, which has all weights: neither the hub nor a weights file is needed.

        Args:
            checkpoint_path (str | Path): The checkpoint.
            *args (Any): Arguments of ``AnomalibModule.load_from_checkpoint``.
            **kwargs (Any): Arguments of ``AnomalibModule.load_from_checkpoint``, and arguments of the model.

        Returns:
            Self: The model.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no checkpoint of this model, or an argument contradicts it.
        """
        if "://" not in str(checkpoint_path):
            with reading(checkpoint_path):
                _check_model(
                    torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True), cls.__name__
                )
        names = _defaults(cls)
        fixed = {name: kwargs.pop(name) for name in list(kwargs) if name in names and name not in _FREE}
        if "pre_processor" in kwargs and "image_size" in names:
            fixed.pop("image_size", None)
            kwargs["image_size"] = None  # of the default one
        model = super().load_from_checkpoint(checkpoint_path, *args, **{"encoder_weights": None, **kwargs})
        theirs = _leaves(model.hparams)
        wrong = {name: theirs.get(name) for name, value in _leaves(fixed).items() if value != theirs.get(name)}
        if "image_size" in wrong and _plain(model.input_size) == _plain(fixed["image_size"]):
            wrong.pop("image_size", None)
        _refuse(cls, wrong)
        return model  # type: ignore[return-value]


def _check_model(checkpoint: Any, name: str) -> None:
    """Refuse the checkpoint of another model, or of another version of this one."""
    content = checkpoint if isinstance(checkpoint, dict) else {}
    found, of = content.get(_FORMAT_KEY), content.get(_MODEL_KEY, name)
    if found is None:
        msg = f"it is no checkpoint of a {name}: give one that a training of this model has written (--ckpt_path)"
    elif of != name:
        msg = f"the checkpoint is of a {of}: give --model {of}"
    elif found != _FORMAT:
        msg = (
            f"the checkpoint is of another version of anomalib-decad (format {found}, this version reads {_FORMAT}): "
            "train again, or install the version that it was trained with"
        )
    else:
        return
    raise ValueError(msg)


def _refuse(cls: type, wrong: Mapping[str, Any]) -> None:
    """Raise for arguments that contradict a checkpoint, whose values are given."""
    if wrong:
        flags = " ".join(f"--model.{name} {_text(value)}" for name, value in wrong.items())
        msg = (
            f"the checkpoint is of another {cls.__name__}: leave out {', '.join(wrong)}, which it knows, or give it "
            f"the arguments {flags}"
        )
        raise ValueError(msg)


def _defaults(cls: type) -> dict[str, Any]:
    """Collect the defaults of a model's arguments, of those too that its bases take as ``**kwargs``."""
    defaults: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            defaults |= {name: parameter.default for name, parameter in inspect.signature(base).parameters.items()}
    return defaults


def _leaves(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """List the arguments that a model is made of, of groups each field, so that equal ones compare equal."""
    leaves: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in _FREE:
            continue
        if is_group(value):
            value = asdict(value)
        fields = (
            {f"{name}.{key}": field for key, field in value.items()} if isinstance(value, Mapping) else {name: value}
        )
        leaves |= {key: _plain(field) for key, field in fields.items()}
    return leaves


def is_group(value: Any) -> bool:
    """Tell whether an argument is a group of others: an instance of a dataclass."""
    return is_dataclass(value) and not isinstance(value, type)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    return str(value).replace(" ", "")
