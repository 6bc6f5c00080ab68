# SPDX-License-Identifier: Apache-2.0
"""Synthesis and decoupling on the embedding between the encoder and the decoder of any model."""

from functools import partial
from typing import Any

import torch
from torch import nn

from anomalib_decad.components.decoupler import Decoupler, DecouplingLoss
from anomalib_decad.components.options import (
    DecouplerOptions,
    DecouplingLossOptions,
    InvertibleOptions,
    SynthesisOptions,
)
from anomalib_decad.components.synthesis import AdversarialSynthesis
from anomalib_decad.ranges import check_range

__all__ = ["LEARNED_DECOUPLER", "LEARNED_LOSS", "LEARNED_SYNTHESIS", "EmbeddingDecoupling", "attach"]

#: Defaults for embeddings that are learned: a small share is removed, without a prior ...
LEARNED_DECOUPLER = DecouplerOptions(abnormal_fraction=0.125, num_prototypes=0)
#: ... anomalies are easy to see ...
LEARNED_SYNTHESIS = SynthesisOptions(fraction=0.5, noise="gaussian")
#: ... and the latent follows the energies.
LEARNED_LOSS = DecouplingLossOptions(normal_weight=1.0, abnormal_weight=1.0, restoration_weight=1.0)

_NORM = 5.0  # of scaled embeddings, as of DecAD's own: its delta is in these units
_MOMENTUM = 0.1  # share of a batch's norm in the running one, as in torch's batch normalization


class EmbeddingDecoupling(nn.Module):
    r"""Layer that removes what is abnormal from the embeddings of another method.

    In training mode it perturbs some of the embeddings (:class:`AdversarialSynthesis`) and then removes their abnormal
    component (:class:`Decoupler`), so that the layers after it learn to answer with what is normal. :meth:`losses`
    gives the terms to add to the method's own loss. In eval mode it only removes. The defaults are those of learned
    embeddings, which have no principal axes to start from (``docs/other-methods.md``).

    The method's encoder gets the gradient of the method's loss as if the layer were the identity, and none of the
    terms: an encoder that followed them would first make all embeddings equal. As embeddings that are learned have no
    scale of their own, they are divided by a running mean of their norm before, and multiplied by it after.

    Args:
        dim (int): Number of channels of an embedding; at least 2.
        delta (float): Radius of the synthetic anomalies where the mean norm of an embedding is 5; positive. Defaults to
            ``2.5``.
        decoupler (DecouplerOptions): Split of the latent. Defaults to :data:`LEARNED_DECOUPLER`.
        synthesis (SynthesisOptions): Options of synthetic anomalies. Defaults to :data:`LEARNED_SYNTHESIS`.
        invertible (InvertibleOptions): Shape of the invertible network.
        loss (DecouplingLossOptions): Weights of the terms, and the margin. Defaults to :data:`LEARNED_LOSS`.

    Raises:
        ValueError: If an argument is out of its range, or ``num_prototypes`` is not 0.

    Example:
        >>> decoupling = EmbeddingDecoupling(dim=32)
        >>> decoupling(torch.randn(2, 32, 7, 7)).shape
        torch.Size([2, 32, 7, 7])
        >>> sorted(decoupling.losses())
        ['abnormal_energy', 'normal_energy', 'restoration']

    Reference:
        DecAD, ICCV 2025: the plug-in for RD4AD, UniAD and MambaAD.
    """

    norm: torch.Tensor

    def __init__(
        self,
        dim: int,
        delta: float = 2.5,
        decoupler: DecouplerOptions = LEARNED_DECOUPLER,
        synthesis: SynthesisOptions = LEARNED_SYNTHESIS,
        invertible: InvertibleOptions = InvertibleOptions(),
        loss: DecouplingLossOptions = LEARNED_LOSS,
    ) -> None:
        super().__init__()
        number = decoupler.num_prototypes
        check_range(number == 0, "num_prototypes", "0: only DecAD has prototypes", number)
        self.dim = dim
        self.decoupler = Decoupler(dim, decoupler, invertible)
        self.synthesis = AdversarialSynthesis(delta, synthesis)
        self.loss = DecouplingLoss(loss)
        self.register_buffer("norm", torch.tensor(0.0))
        self._losses: dict[str, torch.Tensor] | None = None

    @property
    def is_initialized(self) -> bool:
        """Whether it has seen a batch in training mode, or was loaded from a state that had."""
        return bool(self.norm > 0)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Clean embeddings of shape (B, dim, H, W) or (B, N, dim); a ValueError if they have other channels."""
        is_map = embeddings.ndim == 4
        tokens = embeddings.flatten(2).mT if is_map else embeddings
        if tokens.ndim != 3 or tokens.shape[-1] != self.dim:
            wanted = f"(B, {self.dim}, H, W) or (B, N, {self.dim})"
            msg = f"the embedding must be of shape {wanted}, got {tuple(embeddings.shape)}: give its channels as dim"
            raise ValueError(msg)
        if self.training:
            clean = self._train(tokens, (embeddings.shape[2], embeddings.shape[3]) if is_map else None)
        else:
            # Not by 0: a model that never trained keeps the scale.
            scale = _NORM / torch.where(self.norm > 0, self.norm, _NORM)
            clean = self.decoupler(tokens * scale).x_clean / scale
        clean = clean.to(embeddings.dtype)
        return clean.mT.contiguous().unflatten(2, embeddings.shape[2:]) if is_map else clean

    def losses(self) -> dict[str, torch.Tensor]:
        """Give the weighted terms (:class:`DecouplingLoss`) of the last batch in training mode; each is used once.

        Raises:
            RuntimeError: If no batch went through since they were last given.
        """
        if self._losses is None:
            msg = "no batch went through the decoupling in training mode since its losses were last used"
            raise RuntimeError(msg)
        losses, self._losses = self._losses, None
        return losses

    def fuse(self) -> None:
        """Replace the invertible network by a faster one, in place, for inference."""
        self.decoupler.fuse()

    def _train(self, tokens: torch.Tensor, grid: tuple[int, int] | None) -> torch.Tensor:
        with torch.no_grad():
            norm = tokens.float().norm(dim=-1).mean()
            self.norm.copy_(torch.where(self.norm > 0, self.norm.lerp(norm, _MOMENTUM), norm))
            # A copy, as the next batch changes the buffer and this one's gradient needs it.
            scale = _NORM / self.norm.clone().clamp(min=1e-6)
        x = tokens.float() * scale
        fixed = x.detach()
        self.decoupler.initialize(fixed)
        weights = self.decoupler.fold()
        perturbed, mask = self.synthesis(fixed, partial(self.decoupler.energy, weights=weights), grid)
        output = self.decoupler(perturbed, weights=weights)
        self._losses = self.loss(fixed, output.x_clean, output.energy, mask)
        return (output.x_clean + (x - fixed)) / scale


class _DecoupledLayer(nn.Module):
    def __init__(self, layer: nn.Module, decoupling: EmbeddingDecoupling) -> None:
        super().__init__()
        self.layer = layer
        self.decoupling = decoupling

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.decoupling(self.layer(*args, **kwargs))


def attach(model: nn.Module, layer: str, dim: int, **kwargs: Any) -> EmbeddingDecoupling:
    """Decouple the output of one of a model's layers; the sum of ``losses()`` is to be added to the model's loss.

    Args:
        model (nn.Module): Any reconstruction or distillation model.
        layer (str): Name of the submodule whose output is the embedding, of shape (B, dim, H, W) or (B, N, dim), with
            dots as in ``named_modules``.
        dim (int): Number of channels.
        **kwargs (Any): Further arguments of :class:`EmbeddingDecoupling`.

    Returns:
        EmbeddingDecoupling: The module that was put after the layer.

    Raises:
        ValueError: If the model has no such layer, or an argument is out of its range.

    Example:
        >>> autoencoder = nn.ModuleDict({"encoder": nn.Conv2d(3, 16, 4, 4), "decoder": nn.Linear(16, 3)})
        >>> decoupling = attach(autoencoder, "encoder", dim=16)
        >>> autoencoder["encoder"](torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 16, 8, 8])
    """
    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        msg = f"layer: the model has no submodule {layer!r}; it has {', '.join(name for name in modules if name)}"
        raise ValueError(msg)
    decoupling = EmbeddingDecoupling(dim, **kwargs)
    parent, _, name = layer.rpartition(".")
    setattr(modules[parent], name, _DecoupledLayer(modules[layer], decoupling))
    return decoupling
