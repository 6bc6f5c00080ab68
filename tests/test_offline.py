"""Packing for a machine without network, and unpacking there, without network."""

import hashlib
import json
import tarfile

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import offline
from anomalib_decad.components import EncoderWeightsError
from conftest import ENCODER, IMAGE_SIZE, run_benchmark

_PART = 500_000


@pytest.fixture(scope="module")
def pack(encoder_weights, mvtec_root):
    def run(output, *arguments):
        options = ["--encoder", ENCODER, "--encoder-weights", encoder_weights, "--layers", 3, "--missing"]
        offline.main(["pack", "--data", str(mvtec_root), "--output", str(output), *map(str, [*options, *arguments])])

    return run


@pytest.fixture(scope="module")
def packed(pack, mvtec_root, tmp_path_factory):
    """Parts of data whose categories are links."""
    linked = tmp_path_factory.mktemp("linked")
    for category in mvtec_root.iterdir():
        (linked / category.name).symlink_to(category)
    output = tmp_path_factory.mktemp("packed")
    pack(output, "--data", linked, "--part-mb", _PART / 1e6)
    return output


@pytest.fixture(scope="module")
def unpacked(packed, tmp_path_factory):
    """What the parts hold, unpacked one after the other; and what the last call printed."""
    target = tmp_path_factory.mktemp("unpacked")
    for part in sorted(packed.glob("*.tar"), reverse=True):
        result = run_benchmark("offline", "unpack", part, "--target", target)
        assert result.returncode == 0, result.stderr
    return target, result.stdout


def test_parts_hold_what_the_list_says_in_their_size(packed):
    entries = json.loads((packed / "contents.json").read_text())["files"]
    found = []
    for part in sorted(packed.glob("*.tar")):
        assert part.stat().st_size <= _PART
        with tarfile.open(part) as tar:
            for info in tar:
                digest = hashlib.sha256(tar.extractfile(info).read()).hexdigest()
                found.append({"name": info.name, "size": info.size, "sha256": digest, "part": part.name})
    assert found == entries
    assert len({entry["part"] for entry in entries}) > 1
    folders = [entry["name"].partition("/")[0] for entry in entries]
    assert folders == ["wheels", "weights"] + ["data"] * (len(folders) - 2)


def test_images_are_nearly_equal_and_masks_exactly(unpacked, mvtec_root):
    data = unpacked[0] / "data"
    paths = {path.relative_to(mvtec_root) for path in mvtec_root.rglob("*.png")}
    assert {path.relative_to(data) for path in data.rglob("*") if path.is_file()} == paths
    for path in paths:
        before, after = (cv2.imread(str(root / path)).astype(int) for root in (mvtec_root, data))
        difference = np.abs(before - after)
        assert difference.mean() < 4
        assert difference.max() == 0 or "ground_truth" not in path.parts


def test_encoder_gives_the_same_outputs_and_later_blocks_are_left_out(unpacked, make_model):
    path = unpacked[0] / "weights" / f"{ENCODER}.safetensors"
    state = load_file(path)
    assert {"blocks.2.mlp.fc1.weight", "patch_embed.proj.weight", "pos_embed", "norm.weight"} <= set(state)
    assert not any(key.startswith("blocks.3.") for key in state)
    assert all(value.dtype == torch.float16 for value in state.values())
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    expected, outputs = (make_model(**weights).model.encoder(images) for weights in ({}, {"encoder_weights": path}))
    torch.testing.assert_close(outputs, expected, rtol=0.01, atol=0.01)
    with pytest.raises(EncoderWeightsError, match="holds no weights of the encoder"):
        make_model(encoder_weights=path, layers=[1, 4]).model.encoder(images)


def test_wheels_are_installed_and_the_lines_to_use_are_printed(unpacked):
    target, printed = unpacked
    assert (target / "site" / "anomalib_decad" / "__init__.py").is_file()
    assert not list((target / "site").rglob("*.pyc"))
    lines = printed.splitlines()
    assert f"export PYTHONPATH={target}/site" in lines
    assert lines[-1] == f"--data {target}/data --encoder-weights {target}/weights/{ENCODER}.safetensors"


def _flip(data):
    return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]  # behind the header of the first file


@pytest.mark.parametrize(
    "damage", [_flip, lambda data: data[:-100_000], lambda data: data[:100], lambda _: bytes(10240)]
)
def test_damaged_part_is_one_clear_line(packed, tmp_path, damage):
    for name in ("part-2.tar", "contents.json"):
        (tmp_path / name).write_bytes((packed / name).read_bytes())
    part = tmp_path / "part-2.tar"
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(SystemExit, match=r"^\S*part-2.tar is damaged.*copy it again$"):
        offline.main(["unpack", str(tmp_path), "--target", str(tmp_path / "target")])


@pytest.mark.parametrize("name", ["data/../../a.png", "/etc/a", "other/a.png"])
def test_part_cannot_write_elsewhere(tmp_path, name):
    with tarfile.open(tmp_path / "part-1.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(SystemExit, match="is none of the parts"):
        offline.main(["unpack", str(tmp_path), "--target", str(tmp_path / "target")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "--data: no such folder: nowhere"),
        (["--categories", "nuts"], "--categories: no such folder: .*nuts"),
        (["--encoder", "test_vit9"], "--encoder: timm has no model"),
        (["--encoder-weights", "nowhere.pth"], "--encoder-weights: no such file"),
        (["--layers", 7], "--layers: 7 is wanted, and .* has 6 layers"),
        (["--wheels", "six"], "--wheels: 'six' is not of the form"),
        (["--missing", "no-such-package"], "--missing: no-such-package is not installed here"),
        (["--wheels", "no-such-package==1.0"], "no wheel of no-such-package==1.0 for Python 3.12 on x86_64 can be had"),
        (["--part-mb", 0.2], "--part-mb: (wheels|weights)/.* MB, more than a part of 0.2 MB takes"),
    ],
)
def test_bad_input_is_one_clear_line(pack, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match=message) as error:
        pack(tmp_path, *arguments)
    assert "\n" not in str(error.value)
