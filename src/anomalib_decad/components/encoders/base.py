# SPDX-License-Identifier: Apache-2.0
"""Base of the frozen encoders: weights that are loaded lazily, no gradients, eval mode."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from typing_extensions import Self

from anomalib_decad.compat import convert_checkpoint

__all__ = ["EncoderWeightsError", "FrozenEncoder", "check_name"]


class EncoderWeightsError(RuntimeError):
    """The pretrained weights of an encoder cannot be loaded."""


class FrozenEncoder(nn.Module):
    """Base of frozen timm networks.

    The network has no gradients and stays in eval mode. Its weights are loaded in the first forward pass, or by
    :meth:`load_weights`, unless a state dict is loaded before: a checkpoint needs neither the hub nor a weights file.
    A subclass has the network as a submodule, gives it as :attr:`network`, and calls :meth:`freeze_parameters`.

    Args:
        name (str): Name of the network in timm.
        weights (str | Path | None): Local ``.safetensors`` or ``.pth`` file, in the key names of timm or of the
            architecture's original release; ``None`` for timm's pretrained weights, from the Hugging Face hub or its
            local cache.
        pretrained (bool): Whether to load weights at all; random ones are for tests only.

    Raises:
        FileNotFoundError: If ``weights`` is no file.
    """

    def __init__(self, name: str, weights: str | Path | None, pretrained: bool) -> None:
        super().__init__()
        if weights is not None and not Path(weights).is_file():
            msg = f"encoder_weights: no such file: {weights}"
            raise FileNotFoundError(msg)
        self.name = name
        self.weights = None if weights is None else str(weights)
        self._pending = pretrained
        self.register_load_state_dict_post_hook(self._on_state_dict)

    @property
    def network(self) -> Any:  # timm's networks share an interface, but no type
        """The network."""
        raise NotImplementedError

    @property
    def image_mean(self) -> tuple[float, ...]:
        """Channel means that the encoder was trained with."""
        return tuple(self.network.pretrained_cfg.get("mean", (0.485, 0.456, 0.406)))

    @property
    def image_std(self) -> tuple[float, ...]:
        """Channel standard deviations that the encoder was trained with."""
        return tuple(self.network.pretrained_cfg.get("std", (0.229, 0.224, 0.225)))

    def freeze_parameters(self) -> None:
        """Turn gradients off, and eval mode on."""
        self.network.requires_grad_(False)
        self.network.eval()

    def train(self, mode: bool = True) -> Self:
        """Do nothing: the encoder stays in eval mode."""
        del mode
        return self

    def load_weights(self) -> None:
        """Load the pretrained weights, unless they or a state dict have been loaded.

        Raises:
            EncoderWeightsError: If they cannot be loaded. The message says which, and how to give them.
        """
        if not self._pending:
            return
        try:
            # timm draws random weights first: a training's random numbers must not depend on where weights come from.
            with torch.random.fork_rng(devices=[]):
                state = self._read_weights(self.weights) if self.weights else self.create_pretrained().state_dict()
            wanted = self.network.state_dict()
            self.network.load_state_dict({key: value for key, value in state.items() if key in wanted})
        except Exception as error:
            raise EncoderWeightsError(self._missing_weights(error)) from error
        self._pending = False

    def create_pretrained(self) -> nn.Module:
        """Create the network with timm's pretrained weights, with the key names of :attr:`network`."""
        raise NotImplementedError

    def _read_weights(self, path: str) -> Mapping[str, torch.Tensor]:
        return convert_checkpoint(self.network, timm.models.load_state_dict(path, weights_only=True))

    @staticmethod
    def _on_state_dict(module: "FrozenEncoder", incompatible_keys: Any) -> None:
        """Note that weights have been loaded, unless the state dict has none of the encoder's."""
        missing = {f".{name}" for name in incompatible_keys.missing_keys}
        names = [f".{name}" for name in module.state_dict()]
        if not all(any(key.endswith(name) for key in missing) for name in names):
            module._pending = False

    def _missing_weights(self, error: Exception) -> str:
        reason = str(error).strip().partition("\n")[0]
        if self.weights:
            return f"encoder_weights: {self.weights} holds no weights of the encoder {self.name}: {reason}"
        source = self.network.pretrained_cfg.get("hf_hub_id") or self.name
        return (
            f"the weights of the encoder {self.name} ({source}) are not on this machine and could not be downloaded. "
            "Either download the weights file elsewhere and give its path as encoder_weights "
            "(--model.encoder_weights), or copy the Hugging Face cache of a machine that has them and set HF_HOME to "
            f"it and HF_HUB_OFFLINE=1. The cause: {type(error).__name__}: {reason}"
        )


def check_name(name: str, patterns: str | list[str] = "") -> str:
    """Give the architecture of a timm model; a ValueError proposes close names, of those that match the patterns."""
    architecture = name.removeprefix("timm/").partition(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(patterns), n=3)
        hint = f"; close names are {', '.join(close)}" if close else ""
        msg = f"encoder: timm has no model {name!r}{hint}"
        raise ValueError(msg)
    return architecture


def check_multiple(name: str, size: tuple[int, int], multiple: tuple[int, int], text: str) -> None:
    """Refuse an image size in pixels that is no multiple, which the message calls ``text``; name one that is."""
    if any(side % step for side, step in zip(size, multiple, strict=True)):
        good = [max(round(side / step), 1) * step for side, step in zip(size, multiple, strict=True)]
        msg = f"the encoder {name} takes images whose sides are multiples of {text} pixels, got {size[0]} x {size[1]}"
        raise ValueError(f"{msg}; {good[0]} x {good[1]} would do")
