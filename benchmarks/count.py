# SPDX-License-Identifier: Apache-2.0
"""Count learnable parameters and multiply-adds of DecAD's parts and of the other models, beside the papers' figures.

usage: python benchmarks/count.py [--encoder vit_base_patch14_dinov2] [--image-size 280] [--others]

Counts need no trained weights. The solver's iterations are those of a network at its initialization.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anomalib_decad import DecAD
from anomalib_decad.models.mambaad import DecoupledMambaADModel
from anomalib_decad.models.reverse_distillation import DecoupledReverseDistillationModel
from anomalib_decad.models.uniad import DecoupledUniADModel

# Image size, and what is reported of the method without decoupling.
_DECOUPLED = {
    DecoupledReverseDistillationModel: (256, ""),
    DecoupledUniADModel: (224, ", reported: 24.5 M and 3.6 G"),
    DecoupledMambaADModel: (256, ""),
}
_PAPER = "the paper, ViT-B/14: 23.2 M learnable parameters, 48.6 G multiply-adds"


def multiply_adds(function: Callable[[], Any]) -> float:
    """Count the multiply-adds of all matrix products and convolutions of a call."""
    # The counter does not know the CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_base_patch14_dinov2")
    parser.add_argument("--image-size", type=int, default=280)
    parser.add_argument("--others", action="store_true", help="count them, too, with their own encoders")
    args = parser.parse_args()
    model = DecAD(encoder=args.encoder).model
    model.encoder.load_state_dict(model.encoder.state_dict())  # random weights will do
    images = torch.rand(1, 3, args.image_size, args.image_size)
    model.train()(images)  # initializes what a first batch does
    model.eval()
    whole = timm.create_model(args.encoder, num_classes=0, dynamic_img_size=True).eval()
    x, grid = model.fusion(model.encoder(images)), model.encoder.grid(*images.shape[-2:])
    encoder = multiply_adds(lambda: model.encoder(images))
    all_blocks = multiply_adds(lambda: whole.forward_features(images))
    total = multiply_adds(lambda: model(images))
    learnable = {
        name: sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        for name, module in model.named_children()
    }
    rows = [
        (f"encoder, to layer {model.encoder.layers[-1]}", learnable["encoder"], encoder),
        ("decoupler", learnable["decoupler"], multiply_adds(lambda: model.decoupler(x, grid))),
        ("decoder", learnable["decoder"], multiply_adds(lambda: model.decoder(x))),
        ("all", sum(learnable.values()), total),
        ("all, if the encoder ran to its end", sum(learnable.values()), total - encoder + all_blocks),
    ]
    print(f"{args.encoder}, {args.image_size} pixels ({_PAPER})")
    for name, parameters, count in rows:
        print(f"{name:36} {parameters / 1e6:8.2f} M {count / 1e9:8.2f} G")
    for cls, (size, reported) in _DECOUPLED.items() if args.others else ():
        count_other(cls, size, reported)


def count_other(cls: Callable[..., torch.nn.Module], size: int, reported: str) -> None:
    """Print the size of a method with its own encoder, without and with decoupling."""
    images = torch.rand(1, 3, size, size)
    for decouple in (False, True):
        model = cls(pretrained=False, decouple=decouple).eval()
        learnable, total = (
            sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or with_encoder) / 1e6
            for with_encoder in (False, True)
        )
        # Under no_grad the counter stumbles over parameters that are expanded.
        model.requires_grad_(False)
        count = multiply_adds(lambda: model(images)) / 1e9  # noqa: B023
        name = cls.__name__.removesuffix("Model").removeprefix("" if decouple else "Decoupled")
        print(f"{name:36} {learnable:8.2f} M learnable of {total:.2f} M {count:8.2f} G{'' if decouple else reported}")


if __name__ == "__main__":
    main()
