"""Training on cached features is training on images."""

import json
import os
import random
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import MVTecAD
from lightning.pytorch import seed_everything
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2 import ColorJitter, GaussianBlur, RandomApply, RandomHorizontalFlip, Transform

from anomalib_decad.components import DecouplerOptions, ViTEncoder
from conftest import ROOT, losses_of


@pytest.fixture
def count_images(monkeypatch):
    """Count the images that the encoder sees in training mode and while caching."""
    counts = []
    forward = ViTEncoder.forward

    def counting(self, images):
        counts.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(ViTEncoder, "forward", counting)
    return counts


def run(make_engine, make_model, make_data, *callbacks, data=None, ckpt_path=None, seed=7, **kwargs):
    of_model = ("feature_cache", "encoder", "decoupler")
    options = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(of_model)}
    trainer = {"limit_val_batches": 0, **kwargs}
    seed_everything(7)
    model, data = make_model(**options), data or make_data()
    return losses_of(make_engine, model, data, *callbacks, seed=seed, ckpt_path=ckpt_path, **trainer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "sampling", "num_prototypes", "tolerance"),
    [
        ("ram", "natural", 0, 2e-3),
        pytest.param("device", "natural", 16, 1e-2, marks=pytest.mark.exhaustive),
        ("disk", "balanced", 16, 1e-2),
    ],
)
def test_losses_are_those_of_training_on_images(
    mode, sampling, num_prototypes, tolerance, make_engine, make_model, make_data, count_images, tmp_path
):
    both = {"max_epochs": 2, "decoupler": DecouplerOptions(0.5, num_prototypes)}
    expected = run(make_engine, make_model, make_data, data=make_data(sampling=sampling), **both)
    count_images.clear()
    options = {"feature_cache": mode, "feature_cache_dir": tmp_path / "cache", **both}
    data = make_data(sampling=sampling, num_workers=2 * (mode != "ram"))
    cached = run(make_engine, make_model, make_data, data=data, **options)
    assert len(cached) == 6
    assert cached == pytest.approx(expected, rel=tolerance)
    # 12 images once, and 12 of them before to choose the code.
    assert sum(count_images) == 24


@pytest.mark.slow
def test_a_stale_file_is_never_used(make_engine, make_model, mvtec_root, count_images, tmp_path, encoder_weights):
    root, counts = tmp_path / "data", []
    shutil.copytree(mvtec_root / "bolts", root)

    def fit(precision="32-true", **kwargs):
        count_images.clear()
        data = MVTecAD(root=root.parent, category=root.name, num_workers=0, train_batch_size=4)
        model = make_model(feature_cache="disk", feature_cache_dir=tmp_path / "cache", **kwargs)
        make_engine(limit_val_batches=0, max_steps=1, precision=precision).fit(model, datamodule=data)
        counts.append(sum(count_images))

    fit()
    fit()
    fit(layers=[1, 2, 4])
    fit(image_size=(32, 32))
    fit(precision="bf16-mixed")
    state = load_file(str(encoder_weights))
    state["blocks.0.norm1.weight"] = state["blocks.0.norm1.weight"] * 1.01
    save_file(state, str(tmp_path / "other.safetensors"))
    fit(encoder_weights=tmp_path / "other.safetensors")
    path = next((root / "train" / "good").glob("*.png"))
    cv2.imwrite(str(path), 255 - cv2.imread(str(path)))
    fit()
    assert counts == [12, 0, 12, 12, 12, 12, 12]
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 6


@pytest.mark.slow
def test_resuming_gives_the_losses_of_an_unbroken_run(make_engine, make_model, make_data, tmp_path):
    options = {"feature_cache": "disk", "feature_cache_dir": tmp_path / "cache", "max_epochs": 2}
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    unbroken = run(make_engine, make_model, make_data, saver, limit_val_batches=1.0, **options)
    checkpoint = tmp_path / "ckpt" / "epoch=0.ckpt"
    resumed = run(
        make_engine, make_model, make_data, seed=8, ckpt_path=checkpoint, limit_val_batches=1.0,
        encoder_weights=None, **options,
    )  # fmt: skip
    assert resumed == pytest.approx(unbroken[3:], rel=1e-6)


def test_the_datamodule_has_its_images_back(make_engine, make_model, make_data):
    data = make_data()
    run(make_engine, make_model, make_data, data=data, feature_cache="ram")
    assert data.train_data[0].image.ndim == 3
    (results,) = make_engine().train(make_model(feature_cache="ram"), datamodule=data)
    assert 0 <= results["image_AUROC"] <= 1
    assert data.train_data[0].image.ndim == 3


class PythonsOwn(Transform):
    """Darkens one image in a million."""

    def transform(self, inpt, params):
        del params
        return inpt * 0.5 if random.random() < 1e-6 else inpt


@pytest.mark.parametrize(
    "augmentation",
    [RandomHorizontalFlip(0.5), ColorJitter(brightness=0.5), RandomApply([GaussianBlur(3)], p=1e-6), PythonsOwn()],
)
def test_random_augmentations_are_refused(augmentation, make_engine, make_model, make_data):
    data = make_data(train_augmentations=augmentation)
    with pytest.raises(ValueError, match="augmented at random.*feature_cache=off"):
        make_engine().fit(make_model(feature_cache="ram"), datamodule=data)
    assert data.train_data[0].image.ndim == 3


def test_more_than_the_limit_is_refused_before_any_work(make_engine, make_model, make_data, count_images, tmp_path):
    options = {"feature_cache_dir": tmp_path / "cache", "feature_cache_limit": 1e-6}
    for mode in ("ram", "disk"):
        with pytest.raises(ValueError, match="12 images need 6.87e-05 GiB, more than the limit of 1e-06 GiB"):
            make_engine().fit(make_model(feature_cache=mode, **options), datamodule=make_data())
    assert not count_images
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_cached_is_refused(make_engine, make_model, make_data):
    data = make_data()
    data.setup("fit")
    with pytest.raises(ValueError, match="feature_cache needs an anomalib datamodule"):
        make_engine().fit(make_model(feature_cache="ram"), train_dataloaders=data.train_dataloader())
    with pytest.raises(ValueError, match="'off', 'ram', 'device' or 'disk'"):
        make_model(feature_cache="tape")
    with pytest.raises(ValueError, match="positive"):
        make_model(feature_cache="ram", feature_cache_limit=0)


@pytest.mark.parametrize(
    ("mode", "precision", "is_mixed"),
    [("off", "bf16-mixed", True), ("disk", "bf16-mixed", True), ("ram", "32-true", False)],
)
def test_images_are_encoded_in_the_precision_of_the_training(
    precision, is_mixed, mode, make_engine, make_model, make_data, monkeypatch, tmp_path
):
    mixed = []
    forward = ViTEncoder.forward

    def noting(self, images):
        mixed.append(torch.is_autocast_enabled("cpu"))
        return forward(self, images)

    monkeypatch.setattr(ViTEncoder, "forward", noting)
    options = {"feature_cache": mode, "feature_cache_dir": tmp_path / "cache"}
    losses = run(make_engine, make_model, make_data, precision=precision, **options)
    assert np.isfinite(losses).all()
    assert mixed
    assert all(value == is_mixed for value in mixed)


class Gain(torch.nn.Module):
    """An augmentation whose name does not tell what it does."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, image, mask):
        return image * self.factor, mask


def test_augmentations_that_do_not_say_what_they_do_are_told_apart(make_engine, make_model, make_data, tmp_path):
    options = {"feature_cache": "disk", "feature_cache_dir": tmp_path / "cache", "max_steps": 1}
    for factor in (1.0, 0.5, 0.5):
        run(make_engine, make_model, make_data, data=make_data(train_augmentations=Gain(factor)), **options)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


@pytest.mark.parametrize("folder", ["file/cache", "/proc/cache"])
def test_a_folder_that_cannot_be_made_is_one_line(folder, make_engine, make_model, make_data, tmp_path):
    (tmp_path / "file").write_text("")
    model = make_model(feature_cache="disk", feature_cache_dir=tmp_path / folder)
    with pytest.raises(OSError, match=r"^feature_cache: .* cannot be written to .*: give another folder"):
        make_engine().fit(model, datamodule=make_data())


_PROCESSES = """
import json, sys
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from anomalib_decad import DecAD, MultiCategory
from anomalib_decad.components import DecouplerOptions
from conftest import Losses
mode, weights, root, out = sys.argv[1:]
seed_everything(3)
model = DecAD("test_vit", weights, [1, 2], (64, 64), feature_cache=mode, feature_cache_dir=out + "/cache",
    decoupler=DecouplerOptions(0.5, num_prototypes=0))
data = MultiCategory("MVTecAD", root=root, num_workers=0, train_batch_size=2, eval_batch_size=2)
losses = Losses()
engine = Engine(max_steps=3, accelerator="cpu", devices=2, strategy="ddp", default_root_dir=out, limit_val_batches=0,
    callbacks=[losses])
engine.fit(model, datamodule=data)
with open(f"{out}/losses{engine.trainer.global_rank}.json", "w") as file:
    json.dump(losses.values, file)
assert data.train_data[0].image.ndim == 3
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", [pytest.param("ram", marks=pytest.mark.exhaustive), "disk"])
def test_two_processes_have_the_losses_of_two_without(mode, encoder_weights, mvtec_root, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(_PROCESSES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])

    def losses(mode):
        command = [sys.executable, str(script), mode, *map(str, (encoder_weights, mvtec_root, tmp_path / mode))]
        result = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
        )
        assert result.returncode == 0, result.stderr[-4000:]
        # Not from the output: both processes write into it, at times in the middle of the other's line.
        return [json.loads((tmp_path / mode / f"losses{rank}.json").read_text()) for rank in range(2)]

    for values, cached_values in zip(losses("off"), losses(mode), strict=True):
        assert len(values) == 3
        assert cached_values == pytest.approx(values, rel=2e-3)
    assert len(list((tmp_path / mode / "cache").glob("*.npy"))) == (mode == "disk")
