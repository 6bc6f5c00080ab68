"""Whoever uses other models in the same process notices nothing of the package."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# What belongs to others, by identity.
SNAPSHOT = """
import importlib, logging, sys, warnings

def snapshot():
    found = {}
    for name in ("anomalib.cli", "anomalib.cli.cli", "anomalib.engine", "anomalib.engine.engine", "logging",
                 "anomalib.utils.path", "anomalib.loggers", "lightning.pytorch.trainer",
                 "lightning.pytorch.trainer.trainer"):
        module = importlib.import_module(name)
        for key, value in vars(module).items():
            if not key.startswith("_") and (callable(value) or isinstance(value, type)):
                found[name, key] = id(value)
                owner = getattr(value, "__module__", "").partition(".")[0]
                if isinstance(value, type) and owner in ("anomalib", "lightning", "logging"):
                    found.update({(name, key, attribute): id(of) for attribute, of in vars(value).items()
                                  if callable(of) and not attribute.startswith("_abc")})
    loggers = {"": logging.getLogger()}
    loggers |= {name: logging.getLogger(name) for name in
                ("anomalib", "lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "timm", "torch",
                 "py.warnings", "anomalib.engine.engine", "anomalib.callbacks")}
    for name, logger in loggers.items():
        found["logger", name] = (logger.level, logger.propagate, logger.disabled, list(map(id, logger.handlers)),
                                 list(map(id, logger.filters)))
        for handler in logger.handlers:
            found["handler", name, id(handler)] = (handler.level, list(map(id, handler.filters)),
                                                   id(getattr(handler, "stream", None)))
    found["filters"] = list(warnings.filters)
    found["hooks"] = (id(sys.excepthook), id(warnings.showwarning), id(sys.displayhook))
    found["streams"] = (id(sys.stdout), id(sys.stderr))
    return found
"""

TRAIN = """
import sys, torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import seed_everything

root, weights, out = sys.argv[1:]

def data():
    return Folder("bolts", root=root + "/bolts", normal_dir="train/good", abnormal_dir="test/square",
                  train_batch_size=2, eval_batch_size=2, num_workers=0)

def engine(name, **kwargs):
    return Engine(accelerator="cpu", devices=1, logger=False, default_root_dir=f"{out}/{name}",
                  enable_progress_bar=False, **kwargs)

def train_patchcore():
    from anomalib.models import Patchcore
    print("PATCHCORE", flush=True)
    print("PATCHCORE", file=sys.stderr, flush=True)
    seed_everything(1)
    arguments = dict(backbone="test_resnet", layers=["layer1"], pre_trained=False, coreset_sampling_ratio=0.001)
    try:
        engine("patchcore").predict(Patchcore(**arguments), datamodule=data())
    except ValueError as error:  # it is untrained, and anomalib has said that no weights are loaded
        print(error)
    runner, model = engine("patchcore"), Patchcore(**arguments)
    runner.fit(model, datamodule=data())
    print(runner.test(model, datamodule=data()))
    print("callbacks", [type(callback).__name__ for callback in runner.trainer.callbacks])

def train_other(name):
    seed_everything(1)
    if not name:
        return
    if name == "DecAD":
        from anomalib.models import DecAD
        from anomalib_decad.components import DecouplerOptions, InvertibleOptions
        model = DecAD(encoder="test_vit", encoder_weights=weights, layers=[1, 2], image_size=(64, 64),
                      invertible=InvertibleOptions(hidden_dim=8),
                      decoupler=DecouplerOptions(num_prototypes=64))
        engine("decad", max_steps=2).train(model, datamodule=data())
    else:
        from anomalib.models import Padim
        model = Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=8)
        engine("padim").train(model, datamodule=data())
"""


def run(code, root, weights, out):
    command = [sys.executable, "-c", SNAPSHOT + TRAIN + code, root, weights, out]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [str(part) for part in command], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def test_nothing_of_others_is_changed_by_a_training(mvtec_root, encoder_weights, tmp_path):
    """What anomalib and Lightning themselves do in a training, they do in one of another model before."""
    result = run(
        """
before = snapshot()
train_other("DecAD")
after = snapshot()
keys = before.keys() | after.keys()
changed = {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}
print("CHANGED", changed)
""",
        mvtec_root,
        encoder_weights,
        tmp_path,
    )
    assert "CHANGED {}" in result.stdout, result.stdout[-3000:]


def test_another_model_prints_what_it_prints_alone(mvtec_root, encoder_weights, tmp_path):
    outputs = []
    for first in ("", "DecAD"):
        out = tmp_path / (first or "alone")
        result = run(f"train_other('{first}')\ntrain_patchcore()\n", mvtec_root, encoder_weights, out)
        streams = (text.partition("PATCHCORE\n")[2].replace(str(out), "") for text in (result.stdout, result.stderr))
        # Not the progress bar of the coreset, which tells seconds.
        outputs.append([line for text in streams for line in text.splitlines() if "Selecting Coreset" not in line])
    assert any("ckpt_path is not provided" in line for line in outputs[0]), outputs
    assert outputs[1] == outputs[0]
