"""Private names of other libraries are where the package expects them."""

import sys
from importlib import metadata

import pytest
import torch

from anomalib_decad import compat
from anomalib_decad.compat import PRIVATE_NAMES, PrivateName


def version_of(package):
    return sys.version.split()[0] if package == "python" else metadata.version(package)


@pytest.mark.parametrize("private", PRIVATE_NAMES, ids=lambda private: f"{private.package}:{private.name}")
def test_private_names_are_there(private):
    try:
        compat.find(private)
    except (AttributeError, ImportError) as error:
        pytest.fail(
            f"{private.package} {version_of(private.package)} has no {private.module} {private.owner} {private.name} "
            f"({error!r}). {private.remedy} It is private, as: {private.public_way}"
        )


@pytest.mark.parametrize("source", [None, "self._gone"])
def test_a_name_that_is_gone_is_noticed(source):
    gone = PrivateName("torch", "torch.nn.modules.module", "Module", "_gone", source, "", "")
    with pytest.raises(AttributeError):
        compat.find(gone)


def test_no_other_module_touches_a_private_name():
    """An attribute with an underscore belongs to self, a class of the same file, or compat."""
    import ast
    from pathlib import Path

    import anomalib_decad

    own = {"_asdict", "_replace", "_fields"}  # public methods of named tuples
    found = []
    for path in sorted(Path(anomalib_decad.__file__).parent.rglob("*.py")):
        if path.parent.name == "compat":
            continue
        tree = ast.parse(path.read_text())
        # What the file itself defines or sets.
        own_here = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own_here |= {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            is_self = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
            is_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            if node.attr in own | own_here or (is_self and not is_super):
                continue
            found.append(f"{path.name}:{node.lineno} {node.attr}")
    assert not found


def test_a_shallow_copy_shares_weights_but_not_submodules():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    copied = compat.shallow_copy(module)
    assert copied[0] is module[0]
    copied[0] = torch.nn.Identity()
    assert isinstance(module[0], torch.nn.Linear)


def test_importing_modules_are_told_from_imported_ones():
    assert not compat.is_importing("torch")
    assert not compat.is_importing("no.such.module")
    assert compat.marks_as_imported("_initializing", False)
    assert not compat.marks_as_imported("_initializing", True)
    assert not compat.marks_as_imported("name", False)
