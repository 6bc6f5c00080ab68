# SPDX-License-Identifier: Apache-2.0
"""Wheels for another machine: which, from where, and what is absent there. Standard library only."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["MISSING", "absent", "download", "install", "requirements"]

_ROOT = Path(__file__).parents[1]

#: What a machine with PyTorch, Lightning, timm, torchmetrics, OpenCV, scikit-learn and scikit-image lacks.
MISSING = (
    "anomalib", "FrEIA", "jsonargparse", "typeshed-client", "docstring-parser", "omegaconf", "antlr4-python3-runtime",
    "kornia", "kornia-rs", "platformdirs", "rich-argparse", "tifffile",
)  # fmt: skip

_GLIBC = ("_2_28", "_2_27", "_2_17", "2014", "1")


def requirements(missing: Sequence[str], wheels: Sequence[str]) -> list[str]:
    """Find which versions to take.

    Args:
        missing (Sequence[str]): Names of packages; the versions of this environment are taken.
        wheels (Sequence[str]): Packages with versions, as ``NAME==VERSION``, instead or besides.

    Returns:
        list[str]: All as ``NAME==VERSION``. Names of :data:`MISSING` that this environment does without are left out.

    Raises:
        SystemExit: If this environment has no such package.
    """
    installed = {_canonical(dist.metadata["Name"]): dist.version for dist in importlib.metadata.distributions()}
    chosen = {_canonical(wheel.partition("==")[0]): wheel for wheel in wheels}
    for name in missing:
        if _canonical(name) in installed:
            chosen.setdefault(_canonical(name), f"{name}=={installed[_canonical(name)]}")
        elif _canonical(name) not in chosen and name not in MISSING:
            raise SystemExit(f"--missing: {name} is not installed here; name its version: --wheels {name}==VERSION")
    for wheel in wheels:
        name, _, version = wheel.partition("==")
        if not name or not version:
            raise SystemExit(f"--wheels: {wheel!r} is not of the form NAME==VERSION")
    return list(chosen.values())


def download(requirement: str, folder: Path, python: str, machine: str) -> None:
    """Download a wheel for another machine, or build one that every machine takes.

    Args:
        requirement (str): ``NAME==VERSION``, or an empty string for this project.
        folder (Path): Where the wheel goes.
        python (str): The other machine's Python, for example ``"3.12"``.
        machine (str): Its processor, for example ``"x86_64"``.

    Raises:
        SystemExit: If there is no such wheel.
    """
    build = ["wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    if not requirement:
        isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
        error = _pip(*build, *isolation, str(_ROOT))
    else:
        platforms = [f"--platform=manylinux{version}_{machine}" for version in _GLIBC]
        kind = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *platforms]
        error = _pip("download", "--quiet", "--no-deps", *kind, "--dest", str(folder), requirement)
        if error:  # only its source is published
            before = set(folder.iterdir())
            built = _pip(*build, requirement)
            if not built and all(path.name.endswith("-none-any.whl") for path in {*folder.iterdir()} - before):
                error = ""
    if error:
        name = requirement or "this project"
        raise SystemExit(f"no wheel of {name} for Python {python} on {machine} can be had: {error}")


def install(wheels: Sequence[Path], site: Path) -> None:
    """Install wheels into a folder, without an index and without compiling.

    Args:
        wheels (Sequence[Path]): The wheels.
        site (Path): The folder.

    Raises:
        SystemExit: If one is for another Python or machine.
    """
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
    error = _pip("install", "--quiet", *options, *map(str, wheels))
    if error:
        raise SystemExit(f"the wheels cannot be installed into Python {platform.python_version()}: {error}")


def absent(site: Path) -> list[str]:
    """Name what the packages in a folder require and neither it nor this environment has."""
    have = {_canonical(dist.metadata["Name"]) for dist in importlib.metadata.distributions(path=[str(site), *sys.path])}
    wanted = set()
    for dist in importlib.metadata.distributions(path=[str(site)]):
        plain = (requirement for requirement in dist.requires or [] if ";" not in requirement)
        wanted |= {_canonical(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in plain}
    return sorted(wanted - have)


def _pip(*arguments: str) -> str:
    """Run pip; give the line that says what is wrong, or an empty string."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (result.stdout + result.stderr).strip().splitlines() or ["no output"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines)[-1] if result.returncode else ""


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
