# SPDX-License-Identifier: Apache-2.0
"""Count parameters, multiply-adds and operator calls, beside the papers' figures and Dinomaly's.

usage: python benchmarks/count.py [--encoder vit_base_patch14_dinov2] [--image-size 280] [--products 15] [--others]

Counts need no trained weights, and are the same on every machine. The solver's iterations are those of a network at its
initialization. Calls of operators, without views, are those of a batch of 4 on a CPU: a training step (encoder, loss,
backward pass), an inference, and an inference of the model that exports are made of.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import timm
import torch
from anomalib.models import Dinomaly
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import peers
from anomalib_decad import DecAD, DecoupledMambaAD, DecoupledReverseDistillation, DecoupledUniAD

# Image size, and what is reported of the method without decoupling.
_DECOUPLED = {
    DecoupledReverseDistillation: (256, ""),
    DecoupledUniAD: (224, ", reported: 24.5 M and 3.6 G"),
    DecoupledMambaAD: (256, ""),
}
_PAPER = "the paper, ViT-B/14: 23.2 M learnable parameters, 48.6 G multiply-adds"


def multiply_adds(function: Callable[[], Any]) -> float:
    """Count the multiply-adds of all matrix products and convolutions of a call."""
    # The counter does not know the CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2


class CallCounter(TorchDispatchMode):
    """Counts the calls of operators, without those that give a view."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not func.is_view and func is not torch.ops.aten._unsafe_view.default
        return func(*args, **(kwargs or {}))


def operator_calls(function: Callable[[], Any]) -> int:
    """Count the operator calls of a function, the second time that it is called."""
    function()
    with CallCounter() as counter:
        function()
    return counter.calls


def count_training_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> int:
    """Count the operator calls of the forward and backward pass, without the optimizer's."""

    def step() -> None:
        model.zero_grad()
        loss().backward()

    model.train()
    return operator_calls(step)


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_base_patch14_dinov2")
    parser.add_argument("--image-size", type=int, default=280)
    parser.add_argument("--products", type=int, default=15, help="that the model has prototypes of")
    parser.add_argument("--others", action="store_true", help="count them, too, with their own encoders")
    args = parser.parse_args()
    lightning_model = DecAD(encoder=args.encoder)
    model = lightning_model.model
    model.encoder.load_state_dict(model.encoder.state_dict())  # random weights will do
    images = torch.rand(4, 3, args.image_size, args.image_size)
    peers.prepare(model, images, args.products)
    training_step = count_training_step(model, lambda: lightning_model.loss(model(images))["loss"])
    model.eval()
    with torch.no_grad():
        fused = model.fused((args.image_size, args.image_size))
        calls = training_step, operator_calls(lambda: model(images)), operator_calls(lambda: fused(images))
    images = images[:1]
    whole = timm.create_model(args.encoder, num_classes=0, dynamic_img_size=True).eval()
    x = model.fusion(model.encoder(images))
    encoder = multiply_adds(lambda: model.encoder(images))
    all_blocks = multiply_adds(lambda: whole.forward_features(images))
    total = multiply_adds(lambda: model(images))
    learnable = {
        name: sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        for name, module in model.named_children()
    }
    rows = [
        (f"encoder, to layer {model.encoder.layers[-1]}", learnable["encoder"], encoder),
        ("decoupler", learnable["decoupler"], multiply_adds(lambda: model.decoupler(x))),
        ("decoder", learnable["decoder"], multiply_adds(lambda: model.decoder(x))),
        ("all", sum(learnable.values()), total),
        ("all, if the encoder ran to its end", sum(learnable.values()), total - encoder + all_blocks),
    ]
    print(f"{args.encoder}, {args.image_size} pixels ({_PAPER})")
    print("operator calls: a training step {}, an inference {}, an inference of an export {}".format(*calls))
    if args.others:
        count_dinomaly(args.encoder, args.image_size)
    for name, parameters, count in rows:
        print(f"{name:36} {parameters / 1e6:8.2f} M {count / 1e9:8.2f} G")
    for cls, (size, reported) in _DECOUPLED.items() if args.others else ():
        count_other(cls, size, reported)


def count_dinomaly(encoder: str, image_size: int) -> None:
    """Print the operator calls of anomalib's Dinomaly, which needs the weights of its encoder."""
    model = Dinomaly(encoder_name=encoder).model
    images = torch.rand(4, 3, image_size, image_size)
    training_step = count_training_step(model, lambda: model(images, global_step=100))
    with torch.no_grad():
        inference = operator_calls(lambda: model.eval()(images))
    print(f"Dinomaly: a training step {training_step}, an inference {inference}")


def count_other(cls: Callable[..., Any], size: int, reported: str) -> None:
    """Print the size of a method with its own encoder, without and with decoupling."""
    images = torch.rand(1, 3, size, size)
    for decouple in (False, True):
        model = cls(decouple=decouple).model.eval()
        model.encoder.load_state_dict(model.encoder.state_dict())  # random weights will do
        learnable, total = (
            sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or with_encoder) / 1e6
            for with_encoder in (False, True)
        )
        # Under no_grad the counter stumbles over parameters that are expanded.
        model.requires_grad_(False)
        count = multiply_adds(lambda: model(images)) / 1e9  # noqa: B023
        name = cls.__name__.removeprefix("" if decouple else "Decoupled")
        print(f"{name:36} {learnable:8.2f} M learnable of {total:.2f} M {count:8.2f} G{'' if decouple else reported}")


if __name__ == "__main__":
    main()
