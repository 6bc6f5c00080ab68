"""Which errors are said in one line, and which keep their traceback."""

import pytest
from torch.utils.data import DataLoader, Dataset

from anomalib_decad.command_line.errors import line_of
from anomalib_decad.components import InvertibleOptions


def error_of(code, module="anomalib_decad.somewhere"):
    """Run a few lines as if they were in a module, and give their error."""
    try:
        exec(compile(code, "somewhere.py", "exec"), {"__name__": module})
    except Exception as error:
        return error
    raise AssertionError


def test_an_error_raised_on_purpose_is_a_line():
    with pytest.raises(ValueError, match="num_blocks") as caught:
        InvertibleOptions(num_blocks=0)
    assert line_of(caught.value) == str(caught.value)
    assert line_of(error_of("raise ValueError('one\\n  two')")) == "one two"


@pytest.mark.parametrize(
    "code",
    [
        "from contextlib import nullcontext\nwith nullcontext():\n    raise ValueError('why')",
        "try:\n    raise RuntimeError('why')\nfinally:\n    x = int('3')",
        "try:\n    int('x')\nexcept ValueError as error:\n    raise OSError('why') from error",
    ],
)
def test_also_through_blocks(code):
    assert line_of(error_of(code)) == "why"


@pytest.mark.parametrize(
    "code",
    [
        "a, b = [1]",
        "int('x')",
        "{}['x']",
        "None.x",
        "assert False",
        "raise NotImplementedError('abstract')",
        "import json\njson.loads('{')",
        "try:\n    raise ValueError('why')\nexcept ValueError:\n    {}['x']",
    ],
)
def test_a_fault_keeps_its_traceback(code):
    assert line_of(error_of(code)) is None


def test_errors_of_others_keep_their_traceback():
    assert line_of(error_of("raise ValueError('why')", module="another_package.somewhere")) is None


@pytest.mark.parametrize("package", ["lightning.pytorch.trainer", "anomalib.engine", "lightning_fabric.utilities"])
def test_but_not_those_about_wrong_arguments(package):
    assert line_of(error_of("raise FileNotFoundError('no such checkpoint')", module=package)) == "no such checkpoint"
    code = "class MisconfigurationException(Exception): pass\nraise MisconfigurationException('no gpu')"
    assert line_of(error_of(code, module=package)) == "no gpu"
    assert line_of(error_of("raise ValueError('why')", module=package)) is None
    # Python's own error in their lines is a fault.
    assert line_of(error_of("open('/no/such/file')", module=package)) is None


class Images(Dataset):
    def __init__(self, fault):
        self.fault = fault

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {}["x"] if self.fault else InvertibleOptions(num_blocks=0)


@pytest.mark.parametrize("fault", [False, True])
def test_errors_of_processes_that_load_data(fault):
    with pytest.raises((ValueError, KeyError)) as caught:
        list(DataLoader(Images(fault), num_workers=1))
    line = line_of(caught.value)
    if fault:
        assert line is None
    else:
        assert line is not None
        assert line.startswith("num_blocks")
