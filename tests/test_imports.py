"""Imports run one way, and modules stay small."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

LONGEST = 350


def test_the_contracts_of_import_linter_hold():
    command = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([str(command)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("folder", ["src", "benchmarks", "demo", "examples"])
def test_no_module_is_long(folder):
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert not {path for path, length in lengths.items() if length > LONGEST}
