# SPDX-License-Identifier: Apache-2.0
"""Bring what the benchmarks need to a machine without network: wheels, encoder weights and images, in a few tar files.

usage: python benchmarks/offline.py pack --data ROOT [--categories a b] --output DIR
       python benchmarks/offline.py unpack DIR --target T

`pack` runs where there is a network, in an environment that has the project. `unpack` runs on the other machine, which
has PyTorch and the like already; it needs pip and Pillow. The checkout goes along on its own.

Images travel as JPEG and arrive as PNG; masks stay exact. Each part can be unpacked alone; the first has the wheels.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import parts
import wheelhouse

if TYPE_CHECKING:
    from PIL import Image

# Folder in the layout of a hub's cache.
_HUB = "hub"
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def pack(args: argparse.Namespace) -> None:
    """Write the parts."""
    from tqdm import tqdm

    common.check_data(args)
    requirements = ["", *wheelhouse.requirements(args.missing, args.wheels)]
    images = find_images(args.data, args.categories)
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        save_weights(args.encoder, args.encoder_weights, max(args.layers), stage)
        (stage / "wheels").mkdir()
        for requirement in tqdm(requirements, "Wheels "):
            wheelhouse.download(requirement, stage / "wheels", args.python, args.platform)

        def encode(name: str) -> None:
            encode_image(images[name], stage / name, args.longest_side, args.jpeg_quality)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in tqdm(pool.map(encode, images), "Images ", total=len(images)):
                pass
        first = [path for name in ("wheels", "weights", _HUB) for path in sorted((stage / name).rglob("*"))]
        names = [path.relative_to(stage).as_posix() for path in first if path.is_file()] + list(images)
        files = [(name, stage / name) for name in names]
        keys = ("python", "platform", "encoder", "layers", "longest_side", "jpeg_quality")
        facts = {key: getattr(args, key) for key in keys}
        written = parts.write(files, args.output, round(args.part_mb * 1e6), facts)
    for path in (*written, args.output / parts.CONTENTS):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def save_weights(name: str, source: Path | None, last: int, folder: Path) -> None:
    """Save an encoder's weights in half precision, without the transformer blocks that are not needed.

    Weights with all blocks are laid out as a hub's cache, where timm, and so any method, finds them by their name.

    Args:
        name (str): Name of the encoder in timm.
        source (Path | None): A local file with its weights; ``None`` for timm's.
        last (int): The last layer that is needed, counted from 1.
        folder (Path): The file goes to ``weights`` or ``hub`` in it.

    Raises:
        SystemExit: If there are no such weights or layers.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    from anomalib_decad.compat import convert_checkpoint
    from anomalib_decad.components.encoders import check_name

    try:
        check_name(name)
    except ValueError as error:
        raise SystemExit(f"--{error}") from None
    if source is not None and not source.is_file():
        raise SystemExit(f"--encoder-weights: no such file: {source}")
    try:
        network = timm.create_model(name, pretrained=source is None, num_classes=0)
        state = network.state_dict()
        if source is not None:
            given = convert_checkpoint(network, timm.models.load_state_dict(str(source), weights_only=True))
            state = {key: given[key] for key in state if key in given}
    except Exception as error:  # whatever the hub or a file's format raises
        raise SystemExit(f"the weights of {name} cannot be had: {str(error).strip().splitlines()[0]}") from None
    blocks = {key: int(match[1]) + 1 for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    if not state or not 1 <= last <= max(blocks.values(), default=last):
        have = f"{max(blocks.values())} layers" if blocks else "no weights"
        raise SystemExit(f"--layers: {last} is wanted, and {source or name} has {have} of {name}")
    kept = {key: value for key, value in state.items() if blocks.get(key, 0) <= last}
    half = {key: value.half() if value.is_floating_point() else value for key, value in kept.items()}
    if not all(torch.isfinite(value).all() for value in half.values()):
        raise SystemExit(f"--encoder: weights of {name} are too large for half precision")
    file = folder / "weights" / f"{Path(name).name}.safetensors"
    hub_id = network.pretrained_cfg.get("hf_hub_id")
    if hub_id and kept.keys() == network.state_dict().keys():
        repository = folder / _HUB / f"models--{hub_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("packed")
        file = repository / "snapshots" / "packed" / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in half.items()}, file)


def find_images(root: Path, categories: Sequence[str]) -> dict[str, Path]:
    """Find images and masks, behind links, too.

    Args:
        root (Path): Folder in MVTec AD's layout.
        categories (Sequence[str]): Names of the categories.

    Returns:
        dict[str, Path]: The path of each by its name in a part.

    Raises:
        SystemExit: If a category is missing, or two images differ only in their suffix.
    """
    images: dict[str, Path] = {}
    for category in categories:
        if not (root / category / "train" / "good").is_dir():
            raise SystemExit(f"--categories: no such folder: {root / category / 'train' / 'good'}")
        for split in ("train", "test", "ground_truth"):
            suffix = ".png" if split == "ground_truth" else ".jpg"
            for folder, _, names in sorted(os.walk(root / category / split, followlinks=True)):
                for path in (Path(folder, name) for name in sorted(names) if name.lower().endswith(_IMAGES)):
                    member = f"data/{path.relative_to(root).with_suffix(suffix).as_posix()}"
                    if member in images:
                        raise SystemExit(f"--data: {images[member]} and {path} would have the same name")
                    images[member] = path
    if not images:
        raise SystemExit(f"--data: no images in MVTec AD's layout in {root}")
    return images


def encode_image(source: Path, target: Path, longest_side: int, quality: int) -> None:
    """Write an image as JPEG, or a mask as PNG, of at most a size.

    Args:
        source (Path): The image.
        target (Path): Where it goes; a ``.png`` is a mask.
        longest_side (int): Length that no side exceeds, in pixels; 0 for any.
        quality (int): Of the JPEG, up to 95.

    Raises:
        SystemExit: If the image cannot be read, or has more than 8 bits.
    """
    from PIL import Image

    is_mask = target.suffix == ".png"
    try:
        with Image.open(source) as image:
            if image.mode[0] in "IF":
                raise SystemExit(f"--data: {source} has more than 8 bits a channel")
            gray = is_mask or image.mode == "L"
            pixels = _shrink(image.convert("L" if gray else "RGB"), longest_side, is_mask)
    except OSError as error:
        raise SystemExit(f"--data: {source} cannot be read: {error}") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    if not is_mask:
        pixels.save(target, "JPEG", quality=quality, subsampling=0, optimize=True)
        return
    if {value for _, value in pixels.getcolors() or []} <= {0, 255}:
        pixels = pixels.convert("1", dither=Image.Dither.NONE)
    pixels.save(target, "PNG", optimize=True)


def _shrink(image: Image.Image, longest_side: int, is_mask: bool) -> Image.Image:
    from PIL import Image

    share = longest_side / max(image.size)
    if not 0 < share < 1:
        return image
    size = (max(round(image.width * share), 1), max(round(image.height * share), 1))
    return image.resize(size, Image.Resampling.NEAREST if is_mask else Image.Resampling.LANCZOS)


def unpack(args: argparse.Namespace) -> None:
    """Install the wheels, and lay the weights and the images out."""
    target = args.target.resolve()
    found = parts.find(args.parts)
    for beside in sorted({part.parent for part in found}):
        if not (beside / parts.CONTENTS).is_file():
            print(f"no {parts.CONTENTS} in {beside}: its parts are not checked")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor() as pool:
        wheels, images = [], []
        for name, data in itertools.chain.from_iterable(map(parts.read, found)):
            if name.endswith(".jpg"):
                images.append(pool.submit(decode_image, data, (target / name).with_suffix(".png")))
                continue
            path = Path(folder if name.startswith("wheels/") else target, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            if name.startswith("wheels/"):
                wheels.append(path)
        if wheels:
            wheelhouse.install(wheels, target / "site")
        for image in _progress(images, "Images "):
            image.result()
    for line in _summary(target):
        print(line)


def decode_image(data: bytes, target: Path) -> None:
    """Write a JPEG as PNG."""
    from PIL import Image

    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(BytesIO(data)) as image:
        image.save(target, "PNG", compress_level=1)


def _summary(target: Path) -> Iterable[str]:
    if (target / "site").is_dir():
        missing = ", ".join(wheelhouse.absent(target / "site"))
        if missing:
            yield f"not on this machine, though a wheel names it: {missing}"
        yield f"export PYTHONPATH={target / 'site'}"
    options = [f"--data {target / 'data'}"] if (target / "data").is_dir() else []
    options += [f"--encoder-weights {path}" for path in sorted((target / "weights").glob("*.safetensors"))]
    if (target / _HUB).is_dir():
        yield f"export HF_HUB_OFFLINE=1 HF_HUB_CACHE={target / _HUB}"
    yield " ".join(options)


def _progress(values: Sequence[Any], text: str) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return values
    return tqdm(values, text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("pack", help="write the parts", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sub.add_argument("--data", type=Path, required=True, help="folder in MVTec AD's layout")
    sub.add_argument("--categories", nargs="+", help="all that are in the folder, if not given")
    sub.add_argument("--output", type=Path, required=True, help="folder of the parts")
    sub.add_argument("--encoder", default="vit_small_patch14_dinov2")
    sub.add_argument("--layers", type=int, nargs="+", default=[3, 6, 9], help="those behind the last are left out")
    sub.add_argument("--encoder-weights", type=Path, help="a local file instead of timm's")
    sub.add_argument("--python", default="3.12", help="of the other machine")
    sub.add_argument("--platform", default="x86_64", help="processor of the other machine, which runs Linux")
    sub.add_argument(
        "--missing", nargs="*", default=list(wheelhouse.MISSING), help="packages that the other machine lacks"
    )
    sub.add_argument("--wheels", nargs="+", default=[], metavar="NAME==VERSION", help="other versions, other packages")
    sub.add_argument("--jpeg-quality", type=int, default=95)
    sub.add_argument("--longest-side", type=int, default=0, help="of the images in pixels; 0: as they are")
    sub.add_argument("--part-mb", type=float, default=60, help="size of a part at most, in 10^6 bytes")
    sub = commands.add_parser("unpack", help="install and lay out what is in the parts")
    sub.add_argument("parts", type=Path, nargs="+", help="folders of parts, or parts")
    sub.add_argument("--target", type=Path, required=True, help="folder that they are unpacked into")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack or unpack."""
    args = parse(arguments)
    {"pack": pack, "unpack": unpack}[args.command](args)


if __name__ == "__main__":
    main()
