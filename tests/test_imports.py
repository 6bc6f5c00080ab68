"""Imports run one way."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from conftest import ROOT


def test_the_contracts_of_import_linter_hold():
    command = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([str(command)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout[-3000:]


def test_every_dependency_has_a_lowest_version():
    """Those of CI's job with the lowest versions would be the first that ever were."""
    requirements = [Requirement(text) for text in metadata.requires("anomalib-decad") or ()]
    others = [requirement for requirement in requirements if requirement.name != "anomalib-decad"]
    assert len(others) > 20
    assert not [r.name for r in others if not any(part.operator == ">=" for part in r.specifier)]
