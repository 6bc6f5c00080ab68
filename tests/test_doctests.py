"""The examples in docstrings run."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import anomalib_decad

MODULES = sorted(
    info.name for info in pkgutil.walk_packages(anomalib_decad.__path__, "anomalib_decad.") if not info.ispkg
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(
        module, extraglobs={"torch": torch, "nn": nn}, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert failed == 0
