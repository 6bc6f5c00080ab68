# SPDX-License-Identifier: Apache-2.0
"""Frozen networks of timm, whose weights are loaded lazily, and the vision transformer among them."""

import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn
from typing_extensions import Self

from anomalib_decad.compat import convert_checkpoint
from anomalib_decad.ranges import check_range

__all__ = ["EncoderWeightsError", "FrozenEncoder", "ViTEncoder", "check_multiple", "check_name"]


class EncoderWeightsError(RuntimeError):
    """The pretrained weights of an encoder cannot be loaded."""


class FrozenEncoder(nn.Module):
    """Base of frozen timm networks.

    The network has no gradients and stays in eval mode. Its weights are loaded in the first forward pass, or by
    :meth:`load_weights`, unless a state dict is loaded before: a checkpoint needs neither the hub nor a weights file.
    A subclass has the network as its only submodule, and calls :meth:`freeze_parameters`.

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
        self.register_load_state_dict_pre_hook(self._on_state_dict)

    @property
    def network(self) -> Any:  # timm's networks share an interface, but no type
        """The network, the only submodule."""
        return next(self.children())

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
                if self.weights:
                    read = timm.models.load_state_dict(self.weights, weights_only=True)
                    state = convert_checkpoint(self.network, read)
                else:
                    state = self.create_pretrained().state_dict()
            wanted = self.network.state_dict()
            self.network.load_state_dict({key: value for key, value in state.items() if key in wanted})
        except Exception as error:
            raise EncoderWeightsError(self._missing_weights(error)) from error
        self._pending = False

    def create_pretrained(self) -> nn.Module:
        """Create the network with timm's pretrained weights, with the key names of :attr:`network`."""
        raise NotImplementedError

    @staticmethod
    def _on_state_dict(module: "FrozenEncoder", state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Note that weights will be loaded, unless the state dict has none of the encoder's."""
        del args
        if any(key.startswith(prefix) for key in state_dict):
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


class ViTEncoder(FrozenEncoder):
    """Frozen timm vision transformer that returns the patch tokens after chosen layers.

    Layers are transformer blocks, counted from 1; those after the last chosen one are removed. The position embeddings
    are resampled to any image size that is a multiple of the patch.

    Args:
        name (str): Name of a timm vision transformer, for example ``"vit_base_patch14_dinov2"``.
        layers (Sequence[int]): Layers whose outputs are returned, in increasing order.
        weights (str | Path | None): See :class:`FrozenEncoder`. Defaults to ``None``.
        pretrained (bool): See :class:`FrozenEncoder`. Defaults to ``True``.

    Raises:
        ValueError: If ``name`` is no timm vision transformer, or ``layers`` are not layers of it.
        FileNotFoundError: If ``weights`` is no file.
    """

    vit: Any

    def __init__(
        self, name: str, layers: Sequence[int], weights: str | Path | None = None, pretrained: bool = True
    ) -> None:
        super().__init__(name, weights, pretrained)
        self.vit = _create_vit(name)
        depth = len(self.vit.blocks)
        self.layers = tuple(layer for layer in range(1, depth + 1) if layer in layers)
        wanted = f"increasing numbers from 1 to {depth}, the depth of {name}"
        check_range(bool(layers) and self.layers == tuple(layers), "layers", wanted, list(layers))
        self._indices = [layer - 1 for layer in self.layers]
        self.vit.prune_intermediate_layers(self._indices, prune_norm=True, prune_head=True)
        self.freeze_parameters()

    @property
    def dim(self) -> int:
        """Number of channels of a patch token."""
        return self.vit.embed_dim

    @property
    def num_heads(self) -> int:
        """Number of attention heads of a block."""
        return self.vit.blocks[0].attn.num_heads

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        height, width = self.vit.patch_embed.patch_size
        return height, width

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Give the patch rows and columns of an image size in pixels; a ValueError names a size that fits."""
        patch = self.patch_size
        check_multiple(self.name, (height, width), patch, f"its patch of {patch[0]} x {patch[1]}")
        return height // patch[0], width // patch[1]

    def create_pretrained(self) -> nn.Module:
        """Create the transformer with timm's pretrained weights."""
        return timm.create_model(self.name, pretrained=True, num_classes=0)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Encode normalized images (B, 3, H, W): the patch tokens (B, N, dim) of each layer, row by row.

        Raises:
            ValueError: If H or W is no multiple of the patch.
            EncoderWeightsError: If the weights cannot be loaded.
        """
        self.grid(*images.shape[-2:])
        self.load_weights()
        with torch.no_grad(), _antialiasing(self.vit):
            return self.vit.forward_intermediates(
                images, indices=self._indices, norm=False, output_fmt="NLC", intermediates_only=True
            )

    @torch.no_grad()
    def fuse(self, height: int, width: int) -> None:
        """Specialize for one image size in pixels, in place, for inference; a ValueError names a size that fits.

        The position embeddings are resampled once. The outputs are the same; other sizes are no longer taken.
        """
        self.grid(height, width)
        self.load_weights()
        vit = _create_vit(self.name, dynamic_img_size=False)
        if not hasattr(vit, "set_input_size"):
            return  # an architecture without position embeddings to resample
        vit.prune_intermediate_layers(self._indices, prune_norm=True, prune_head=True)
        vit.load_state_dict(self.vit.state_dict())
        with _antialiasing(self.vit):
            vit.set_input_size((height, width))
        self.vit = vit.requires_grad_(False).eval().to(next(self.vit.parameters()).device)


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


@contextmanager
def _antialiasing(vit: nn.Module) -> Iterator[None]:
    """Have timm resample positions with antialiasing (docs/upstream.md, "Antialiasing is switched off")."""
    module: Any = sys.modules[type(vit).__module__]
    current = getattr(module, "resample_abs_pos_embed", resample_abs_pos_embed)
    if current is resample_abs_pos_embed:
        yield
        return
    module.resample_abs_pos_embed = resample_abs_pos_embed
    try:
        yield
    finally:
        module.resample_abs_pos_embed = current


def _create_vit(name: str, dynamic_img_size: bool = True) -> Any:
    """Create a timm vision transformer with random weights."""
    check_name(name, ["vit_*", "deit*", "eva*", "beit*"])
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=dynamic_img_size)
    except TypeError:  # an architecture without image sizes to choose
        model = None
    if not all(hasattr(model, part) for part in ("blocks", "patch_embed", "forward_intermediates")):
        msg = f"encoder: {name!r} is no vision transformer that gives the outputs of its layers"
        raise ValueError(msg)
    return model
