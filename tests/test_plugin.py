"""Registration, each case in a fresh interpreter."""

import os
import subprocess
import sys
import textwrap
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

LOOKUPS = """
from anomalib.models import DecAD, get_model, list_models
from anomalib.models import DecoupledMambaAD, DecoupledReverseDistillation, DecoupledUniAD
from anomalib.models.image import DecAD as image_model
import anomalib.data, anomalib.models
from anomalib.data import MultiCategory, get_datamodule
import anomalib_decad
assert DecAD is image_model is anomalib_decad.DecAD
assert MultiCategory is anomalib_decad.MultiCategory
assert "dec_a_d" in list_models() and "DecAD" in list_models("pascal")
assert not any("module" in name for name in list_models())
assert "DecAD" in anomalib.models.__all__ and "DecAD" in anomalib.models.image.__all__
assert "MultiCategory" in anomalib.data.__all__
for name in ("decad", "DecAD", {"class_path": "DecAD"}, {"class_path": "anomalib.models.DecAD"},
             {"class_path": "anomalib.models.image.DecAD"}, {"class_path": "anomalib_decad.DecAD"}):
    model = get_model(name, encoder="test_vit", layers=[1, 2])
    assert type(model) is DecAD, name
for name in ("DecoupledUniAD", {"class_path": "anomalib.models.DecoupledUniAD"}):
    assert type(get_model(name, encoder="test_resnet")) is anomalib_decad.DecoupledUniAD is DecoupledUniAD, name
assert DecoupledMambaAD is anomalib_decad.DecoupledMambaAD
assert DecoupledReverseDistillation is anomalib_decad.DecoupledReverseDistillation
config = {"class_path": "MultiCategory", "init_args": {"datamodule": "MVTecAD", "categories": ["bottle"]}}
assert type(get_datamodule(config)) is MultiCategory
print("found everything")
"""


def run(code, **environment):
    env = {**os.environ, "PYTHONWARNINGS": "default", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "",
        "import torch",
        "import anomalib.models",
        "from anomalib_decad import MultiCategory",
        "import anomalib_decad.models.decad.lightning_model",
        pytest.param("import anomalib_decad.components", marks=pytest.mark.exhaustive),
    ],
)
def test_everything_is_found_whatever_was_imported_first(first):
    result = run(first + LOOKUPS)
    assert "found everything" in result.stdout, result.stderr
    assert "cannot be used in anomalib" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import anomalib_decad", "import anomalib.models, anomalib_decad"])
def test_without_torchs_autoload_the_import_is_enough(first):
    result = run(first + LOOKUPS, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "found everything" in result.stdout, result.stderr


@pytest.mark.slow
def test_a_broken_dependency_is_one_warning_and_anomalib_goes_on():
    # Blocked for our modules only.
    result = run("""
        import sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name == "anomalib_decad.components.invertible" or name == "anomalib_decad.data":
                    raise ImportError("a dependency is missing")
        sys.meta_path.insert(0, Block())
        import torch
        from anomalib.models import Padim, get_model
        import anomalib.data, anomalib.models
        assert "DecAD" not in anomalib.models.__all__ and "MultiCategory" not in anomalib.data.__all__
        print("goes on")
    """)
    assert "goes on" in result.stdout, result.stderr
    assert result.stderr.count("anomalib_decad is installed but cannot be used in anomalib") == 1


@pytest.mark.slow
def test_an_existing_name_is_never_replaced(tmp_path):
    (tmp_path / "rival.py").write_text("class Padim: pass\nclass Rival: pass\n")
    metadata = tmp_path / "rival-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[anomalib.models]\nPadim = rival:Padim\nRival = rival:Rival\n")
    result = run(
        "from anomalib.models import Padim, Rival; print(Padim.__module__, Rival.__module__)", PYTHONPATH=str(tmp_path)
    )
    assert result.stdout.split() == ["anomalib.models.image.padim.lightning_model", "rival"], result.stderr


@pytest.mark.slow
def test_without_the_trigger_anomalib_is_as_before():
    result = run(
        """
        import sys
        import anomalib.models, anomalib.data
        assert not hasattr(anomalib.models, "DecAD") and not hasattr(anomalib.data, "MultiCategory")
        assert not any(name.startswith("anomalib_decad") for name in sys.modules)
        print("as before")
        """,
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert "as before" in result.stdout, result.stderr


@pytest.mark.slow
def test_everything_is_found_in_a_wheel(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    result = run(LOOKUPS + "print(anomalib_decad.__file__)", PYTHONPATH=str(installed))
    assert "found everything" in result.stdout, result.stderr
    assert str(installed) in result.stdout


@pytest.mark.slow
def test_importing_the_package_imports_nothing_heavy():
    result = run("""
        import sys, anomalib_decad
        heavy = {"torch", "anomalib", "numpy", "timm", "lightning"} & set(sys.modules)
        assert not heavy, heavy
        assert {"DecAD", "DecADModel", "MultiCategory"} <= set(dir(anomalib_decad))
        try:
            anomalib_decad.nothing
        except AttributeError:
            print("light")
    """)
    assert "light" in result.stdout, result.stderr


def test_entry_points_are_declared():
    for group, name in (("anomalib.models", "DecAD"), ("anomalib.data", "MultiCategory"), ("torch.backends", None)):
        values = {entry.name: entry.value for entry in entry_points(group=group)}
        assert values[name or "anomalib_decad"].startswith("anomalib_decad")
