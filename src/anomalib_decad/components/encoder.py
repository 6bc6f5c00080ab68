# SPDX-License-Identifier: Apache-2.0
"""The frozen vision transformer whose features are reconstructed."""

import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import LayerScale, resample_abs_pos_embed
from torch import nn
from typing_extensions import Self

__all__ = ["EncoderWeightsError", "FrozenEncoder", "ViTEncoder", "check_name"]


class EncoderWeightsError(RuntimeError):
    """The pretrained weights of an encoder cannot be loaded."""


class FrozenEncoder(nn.Module):
    """Base of frozen timm networks.

    The parameters get no gradient, and the network stays in eval mode whatever :meth:`train` is told. The pretrained
    weights are loaded by :meth:`load_weights`, at the latest at the first forward pass, unless a state dict is loaded
    before: a checkpoint brings the encoder's weights, and needs neither the hub nor a weights file.

    A subclass has the network as a submodule, gives it as :attr:`network`, and calls :meth:`freeze_parameters`.

    Args:
        name (str): Name of the network in timm.
        weights (str | Path | None): Local ``.safetensors`` or ``.pth`` file; ``None`` for timm's pretrained weights,
            from the Hugging Face hub or its local cache.
        pretrained (bool): Whether to load weights at all; random ones are good for tests only.

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
        """Have no gradients, and evaluate."""
        self.network.requires_grad_(False)
        self.network.eval()

    def train(self, mode: bool = True) -> Self:
        """Do nothing: the encoder stays in eval mode."""
        del mode
        return self

    def load_weights(self) -> None:
        """Load the pretrained weights, unless they or a state dict have been loaded.

        Raises:
            EncoderWeightsError: If they cannot be had. The message says which were wanted and how to give them.
        """
        if not self._pending:
            return
        try:
            state = self.read_weights(self.weights) if self.weights else self._download_weights()
            wanted = self.network.state_dict()
            self.network.load_state_dict({key: value for key, value in state.items() if key in wanted})
        except Exception as error:
            raise EncoderWeightsError(self._missing_weights(error)) from error
        self._pending = False

    def read_weights(self, path: str) -> Mapping[str, torch.Tensor]:
        """Read a local file.

        Args:
            path (str): The file.

        Returns:
            Mapping[str, torch.Tensor]: The weights in timm's key names.
        """
        return timm.models.load_state_dict(path, weights_only=True)

    def pretrained_weights(self) -> Mapping[str, torch.Tensor]:
        """Get timm's pretrained weights, from the hub or its local cache."""
        raise NotImplementedError

    def _download_weights(self) -> Mapping[str, torch.Tensor]:
        # timm draws random weights first; the random numbers of a training must not depend on where weights come from.
        with torch.random.fork_rng(devices=[]):
            return self.pretrained_weights()

    @staticmethod
    def _on_state_dict(module: "FrozenEncoder", incompatible_keys: object) -> None:
        del incompatible_keys
        module._pending = False

    def _missing_weights(self, error: Exception) -> str:
        reason = str(error).strip().partition("\n")[0]
        if self.weights:
            return f"encoder_weights: {self.weights} holds no weights of the encoder {self.name}: {reason}"
        source = self.network.pretrained_cfg.get("hf_hub_id") or self.name
        return (
            f"the weights of the encoder {self.name} ({source}) are not on this machine and could not be downloaded. "
            "Either download the weights file elsewhere and give its path as encoder_weights "
            "(--model.encoder_weights), or copy the Hugging Face cache of a machine that has them and set "
            f"HF_HOME to it and HF_HUB_OFFLINE=1. The cause: {type(error).__name__}: {reason}"
        )


class ViTEncoder(FrozenEncoder):
    """Frozen timm vision transformer that returns the patch tokens after chosen blocks.

    Nothing behind the last chosen block is kept or computed. Images of any size whose sides are multiples of the patch
    are taken; position embeddings are resampled to it.

    Args:
        name (str): Name of a timm vision transformer, for example ``"vit_base_patch14_dinov2"``.
        blocks (Sequence[int]): Blocks whose outputs are returned, counted from 1, in increasing order.
        weights (str | Path | None): Local ``.safetensors`` or ``.pth`` file in timm's or the original DINOv2's key
            names. Defaults to ``None``: timm's pretrained weights, from the Hugging Face hub or its local cache.
        pretrained (bool): Whether to load weights at all; random ones are good for tests only.

    Raises:
        ValueError: If ``name`` is no timm vision transformer, or ``blocks`` are not blocks of it.
        FileNotFoundError: If ``weights`` is no file.
    """

    vit: Any

    def __init__(
        self,
        name: str,
        blocks: Sequence[int],
        weights: str | Path | None = None,
        pretrained: bool = True,
    ) -> None:
        super().__init__(name, weights, pretrained)
        self.vit = _create_vit(name)
        depth = len(self.vit.blocks)
        if (
            not blocks
            or any(isinstance(block, bool) or not isinstance(block, int) for block in blocks)
            or sorted(set(blocks)) != list(blocks)
            or not (blocks[0] >= 1 and blocks[-1] <= depth)
        ):
            msg = f"blocks must be increasing numbers from 1 to {depth}, the depth of {name}; got {list(blocks)}"
            raise ValueError(msg)
        self.indices = [block - 1 for block in blocks]
        self.vit.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.freeze_parameters()

    @property
    def network(self) -> Any:
        """The transformer."""
        return self.vit

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
        """Compute the number of patches in an image.

        Args:
            height (int): Image height in pixels.
            width (int): Image width in pixels.

        Returns:
            tuple[int, int]: Number of patch rows and columns.

        Raises:
            ValueError: If a side is no multiple of the patch; the message names a size that is.
        """
        patch_height, patch_width = self.patch_size
        if height % patch_height or width % patch_width:
            good = [max(round(s / p), 1) * p for s, p in ((height, patch_height), (width, patch_width))]
            msg = (
                f"the encoder {self.name} takes images whose sides are multiples of its patch of "
                f"{patch_height} x {patch_width} pixels, got {height} x {width}; {good[0]} x {good[1]} would do"
            )
            raise ValueError(msg)
        return height // patch_height, width // patch_width

    def read_weights(self, path: str) -> Mapping[str, torch.Tensor]:
        """Read a local file, and convert the key names of the architecture's original release to timm's."""
        state = super().read_weights(path)
        convert = getattr(sys.modules[type(self.vit).__module__], "checkpoint_filter_fn", None)
        return convert(state, self.vit) if convert else state

    def pretrained_weights(self) -> Mapping[str, torch.Tensor]:
        """Get timm's pretrained weights, from the hub or its local cache."""
        return timm.create_model(self.name, pretrained=True, num_classes=0).state_dict()

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Encode images.

        Args:
            images (torch.Tensor): Normalised images of shape (B, 3, H, W); H and W are multiples of the patch.

        Returns:
            list[torch.Tensor]: Patch tokens of shape (B, N, dim), N patches row by row, for each of the blocks.

        Raises:
            ValueError: If the image size does not fit.
            EncoderWeightsError: If the weights had to be loaded and could not.
        """
        self.grid(*images.shape[-2:])
        self.load_weights()
        with torch.no_grad(), self._own_resampling():
            return self.vit.forward_intermediates(
                images, indices=self.indices, norm=False, output_fmt="NLC", intermediates_only=True
            )

    @torch.no_grad()
    def freeze(self, height: int, width: int) -> None:
        """Specialise for one image size, in place, for inference: other sizes are no longer taken.

        The position embeddings are resampled once instead of in each forward pass, and the scales behind attention
        and MLP are multiplied into the weights in front of them. The outputs are the same within rounding.

        Args:
            height (int): Image height in pixels, a multiple of the patch.
            width (int): Image width in pixels.

        Raises:
            ValueError: If the image size does not fit.
        """
        self.grid(height, width)
        self.load_weights()
        vit = _create_vit(self.name, dynamic_img_size=False)
        if not hasattr(vit, "set_input_size"):
            return  # an architecture without position embeddings to resample
        vit.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        vit.load_state_dict(self.vit.state_dict())
        with self._own_resampling():
            vit.set_input_size((height, width))
        for block in vit.blocks:
            _fold_layer_scale(block)
        self.vit = vit.requires_grad_(False).eval().to(next(self.vit.parameters()).device)

    @contextmanager
    def _own_resampling(self) -> Iterator[None]:
        """Let timm resample position embeddings with antialiasing.

        anomalib's TimmFeatureExtractor switches it off for the whole process: a model would give other scores once,
        say, a Dinomaly has been created.
        """
        module = sys.modules[type(self.vit).__module__]
        current = getattr(module, "resample_abs_pos_embed", None)
        if current is None or current is resample_abs_pos_embed:
            yield
            return
        module.resample_abs_pos_embed = resample_abs_pos_embed  # type: ignore[attr-defined]
        try:
            yield
        finally:
            module.resample_abs_pos_embed = current  # type: ignore[attr-defined]


def check_name(name: str, patterns: str | list[str] = "") -> str:
    """Check that timm has a model.

    Args:
        name (str): Name of the model, with or without timm's prefix and tag.
        patterns (str | list[str]): Which names may be proposed instead.
            Defaults to ``""``: all.

    Returns:
        str: Name of its architecture.

    Raises:
        ValueError: If there is none; the message has names that are close.
    """
    architecture = name.removeprefix("timm/").partition(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(patterns), n=3)
        hint = f"; close names are {', '.join(close)}" if close else ""
        msg = f"encoder: timm has no model {name!r}{hint}"
        raise ValueError(msg)
    return architecture


def _create_vit(name: str, dynamic_img_size: bool = True) -> Any:  # timm's transformers share an interface, but no type
    """Create a timm vision transformer with random weights."""
    check_name(name, ["vit_*", "deit*", "eva*", "beit*"])
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=dynamic_img_size)
    except TypeError:  # an architecture without image sizes to choose
        model = None
    if not all(hasattr(model, part) for part in ("blocks", "patch_embed", "forward_intermediates")):
        msg = f"encoder: {name!r} is no vision transformer that gives the outputs of its blocks"
        raise ValueError(msg)
    return model


def _fold_layer_scale(block: nn.Module) -> None:
    """Multiply the scales of a timm transformer block into the linear maps in front of them."""
    for name, path in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
        scale = getattr(block, name, None)
        try:
            linear = block.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(scale, LayerScale) and isinstance(linear, nn.Linear):
            linear.weight.mul_(scale.gamma[:, None])
            if linear.bias is not None:
                linear.bias.mul_(scale.gamma)
            setattr(block, name, nn.Identity())
