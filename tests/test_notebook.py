"""The notebook runs from its first to its last cell, on the tiny encoder, and has the outputs of a run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import IMAGE_SIZE, TINY

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "decad.ipynb"


@pytest.mark.slow
def test_notebook(encoder_weights, mvtec_root, tmp_path):
    pytest.importorskip("openvino")
    cells = [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    arguments = {
        **TINY, "encoder_weights": str(encoder_weights), "image_size": (IMAGE_SIZE, IMAGE_SIZE), "feature_cache": "ram",
    }  # fmt: skip
    settings = f"""
from pathlib import Path
from anomalib_decad.components import DecouplerOptions, InvertibleOptions
DATA, STEPS, MODEL, OUTPUT = Path({str(mvtec_root)!r}), 3, {arguments}, Path("output")
"""
    assert set(re.findall(r"^([A-Z]+) = ", cells[0], re.MULTILINE)) == {"DATA", "STEPS", "MODEL", "OUTPUT"}
    script = tmp_path / "notebook.py"
    script.write_text("\n".join([settings, *cells[1:]]))
    result = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "12 images to train with, 12 to test with" in result.stdout
    scores = re.findall(r"^(bolts|cloth): (\S+) by OpenVINO, (\S+) by the model$", result.stdout, re.MULTILINE)
    assert [category for category, *_ in scores] == ["bolts", "cloth"]
    # Whether they agree is tested in tests/export: an export recognizes the product, which an encoder with random
    # weights does badly, and then decides by other limits than the model, which knows it.
    assert all(0 <= float(score) <= 1 for _, *both in scores for score in both)
    assert (tmp_path / "output" / "results").is_dir()


def test_the_notebook_has_its_outputs():
    text = NOTEBOOK.read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    # The first has only settings.
    assert all(cell["execution_count"] for cell in cells)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/jpeg" in output.get("data", {}) for output in outputs)
    assert "AUPRO" in text
    assert not re.findall(r"/(?:home|root|tmp|work|Users)/|[A-Z]:\\\\Users", text)
    assert len(text) < 500_000
