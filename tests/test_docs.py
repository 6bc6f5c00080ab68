"""Documents name arguments, files and scripts that exist."""

import dataclasses
import importlib.util
import inspect
import re

import numpy as np
import pytest
import yaml

import anomalib_decad
from anomalib_decad.thresholds import BestF1, CategoryPostProcessor, FalseAlarmRate, FixedThreshold
from conftest import ROOT

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/NOTES.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "src").rglob("README.md")),
]
POLICIES = (BestF1, FalseAlarmRate, FixedThreshold)
MODELS = ("DecAD", "DecoupledMambaAD", "DecoupledReverseDistillation", "DecoupledUniAD")


def arguments():
    """All arguments of the models, those in groups with a dot."""
    found = set()
    for cls in {base for name in MODELS for base in getattr(anomalib_decad, name).__mro__}:
        for argument, parameter in inspect.signature(cls.__init__).parameters.items():
            found.add(argument)
            if dataclasses.is_dataclass(parameter.default):
                found |= {f"{argument}.{field.name}" for field in dataclasses.fields(parameter.default)}
    for argument in inspect.signature(CategoryPostProcessor).parameters:
        found.add(f"post_processor.{argument}")
        if argument.endswith("_policy"):
            fields = {name for policy in POLICIES for name in inspect.signature(policy).parameters}
            found |= {f"post_processor.{argument}.{name}" for name in fields}
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_arguments_exist(path):
    text = path.read_text()
    named = re.findall(r"--model\.([a-z_.]+[a-z_])", text)
    for settings in re.findall(r"--(?:set|vary) ((?:[a-z_.]+=[^\s`]+\s*)+)", text):
        named += re.findall(r"([a-z_.]+)=", settings)
    groups = {name.partition(".")[0] for name in arguments() if "." in name}
    fields = re.findall(r"`([a-z_]+\.(?!py`)[a-z_]+)`", text)
    named += [name for name in fields if name.partition(".")[0] in groups - {"loss"}]
    assert not sorted(set(named) - arguments() - {"help"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_scripts_exist(path):
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (path.parent / link).exists()]
    scripts = re.findall(r"(?:benchmarks|demo|examples)/[a-z_]+\.py", text)
    missing += [script for script in scripts if not (ROOT / script).is_file()]
    assert not missing


def test_ablations_name_arguments():
    import experiments

    named = {name for settings in experiments.ABLATIONS.values() for setting in settings for name in setting}
    assert named <= arguments()


def test_the_drawing_is_what_the_script_draws():
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    images = ROOT / "docs" / "images"
    assert pictures.architecture() == (images / "architecture.svg").read_text()
    assert sum(path.stat().st_size for path in images.iterdir()) < 300_000
    # Where nothing is found, the picture keeps its brightness, and the outline is that of the mask.
    image, mask = np.full((8, 8, 3), 100, np.uint8), np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 255
    drawn = pictures.overlay(image, np.zeros((8, 8)), mask)
    assert (drawn[0, 0] == 105).all()
    assert (drawn[2, 2] > 200).all()


def test_the_citation_is_that_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert paper["title"] in readme
    assert paper["url"] in readme
    assert all(f"{author['given-names']} {author['family-names']}" in readme for author in paper["authors"])
