"""Private names of other libraries are where the package expects them, and in one module."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch

import anomalib_decad
from anomalib_decad import compat


@pytest.mark.parametrize(("module", "owner", "name", "source"), compat.PRIVATE_NAMES)
def test_private_names_are_there(module, owner, name, source):
    found = importlib.import_module(module)
    found = getattr(found, owner) if owner else found
    gone = source not in inspect.getsource(found) if source else not hasattr(found, name)
    assert not gone, f"{module} has no {owner}.{name}: mend what uses it in compat.py"


def test_no_other_module_touches_a_private_name():
    """An attribute with an underscore belongs to self, a class of the same file, or compat."""
    own = {"_asdict", "_replace", "_fields"}  # public methods of named tuples
    own |= {name for _, owner, name, _ in compat.PRIVATE_NAMES if owner in {"Tensor", "Module"}}
    found = []
    for path in sorted(Path(anomalib_decad.__file__).parent.rglob("*.py")):
        if path.name == "compat.py":
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
