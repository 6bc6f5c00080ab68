"""Tiny encoders and datasets, so that the tests are quick and need neither network nor data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Before any hub client is imported: a test that reaches for the hub is wrong.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is: test processes beside each other have a thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback, seed_everything

from anomalib_decad import DecAD, MultiCategory
from anomalib_decad.components import DecouplerOptions, InvertibleOptions

ENCODER = "test_vit"  # timm's own tiny transformer: 6 blocks, 64 channels, patch of 16
IMAGE_SIZE = 64
#: Arguments of a DecAD that is quick to train.
TINY = {
    "encoder": ENCODER,
    "layers": [1, 2, 3],
    "invertible": InvertibleOptions(hidden_dim=8),
    "decoupler": DecouplerOptions(num_prototypes=64),
}
ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
ANOMALIB = str(Path(sys.executable).with_name("anomalib"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(min(torch.get_num_threads(), 2))


@pytest.fixture(scope="session")
def weights_of(tmp_path_factory):
    """Random weights of timm networks, as timm names them, in files."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")

    def find(name) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                state = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
            save_file(state, str(path))
        return path

    return find


@pytest.fixture(scope="session")
def encoder_weights(weights_of) -> Path:
    """Weights of the tiny encoder."""
    return weights_of(ENCODER)


@pytest.fixture(scope="session")
def mvtec_root(tmp_path_factory) -> Path:
    """Two categories in MVTec AD's layout: textures with and without bright squares."""
    root = tmp_path_factory.mktemp("mvtec") / "factory"
    make_dataset(root, ("bolts", "cloth"))
    return root


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


@pytest.fixture
def make_model(encoder_weights):
    def make(**kwargs):
        options = {**TINY, "encoder_weights": encoder_weights}
        options["image_size"] = None if "pre_processor" in kwargs else (IMAGE_SIZE, IMAGE_SIZE)
        return DecAD(**{"visualizer": False, **options, **kwargs})

    return make


@pytest.fixture
def make_data(mvtec_root):
    return lambda **kwargs: MultiCategory(
        "MVTecAD", root=mvtec_root, **{"num_workers": 0, "train_batch_size": 4, "eval_batch_size": 6, **kwargs}
    )


@pytest.fixture(scope="session")
def data_args(mvtec_root):
    return [
        "--data", "MultiCategory", "--data.datamodule", "MVTecAD", "--data.root", mvtec_root,
        "--data.categories", "[bolts,cloth]", "--data.num_workers", "0", "--data.train_batch_size", "4",
    ]  # fmt: skip


@pytest.fixture
def make_engine(tmp_path):
    def make(*callbacks, **kwargs):
        options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "max_steps": 3}
        if "max_epochs" in kwargs:
            del options["max_steps"]
        return Engine(default_root_dir=tmp_path, callbacks=list(callbacks), **{**options, **kwargs})

    return make


def losses_of(make_engine, model, data, *callbacks, seed=7, ckpt_path=None, **kwargs):
    seed_everything(seed)
    losses = Losses()
    make_engine(losses, *callbacks, **kwargs).fit(model, datamodule=data, ckpt_path=ckpt_path)
    return losses.values


def anomalib(*args, check=True, **environment):
    """Run the real anomalib command."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(
        [ANOMALIB, *map(str, args)], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    if check:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result


def run_benchmark(name, *arguments):
    """Run a script of benchmarks/ as a user does."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def make_dataset(root: Path, categories: tuple[str, ...], num_train: int = 6, num_test: int = 3) -> None:
    """Write categories in MVTec AD's layout, of different image sizes."""
    rng = np.random.default_rng(0)
    for index, category in enumerate(categories):
        size = (80 + 16 * index, 96)
        for split, label, count in (
            ("train", "good", num_train),
            ("test", "good", num_test),
            ("test", "square", num_test),
        ):
            for number in range(count):
                image = rng.integers(60, 120, (*size, 3), dtype=np.uint8)
                image[:, :: 8 + 4 * index] //= 2
                mask = np.zeros(size, np.uint8)
                if label != "good":
                    y, x = rng.integers(10, 50, 2)
                    mask[y : y + 20, x : x + 20] = 255
                    image[mask > 0] = 250
                    _write(root / category / "ground_truth" / label / f"{number:03}_mask.png", mask)
                _write(root / category / split / label / f"{number:03}.png", image)


def _write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def validated(post_processor, names=("bolt", "nut")):
    """Give a post-processor the limits that a validation would have found."""
    for name in ("image_min", "image_max", "pixel_min", "pixel_max"):
        getattr(post_processor, name).fill_(1.0)
    post_processor.set_threshold(image=0.25, pixel=0.5)
    post_processor.follow(names)
    return post_processor
