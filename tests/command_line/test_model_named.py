"""Which model a command is about."""

import pytest

from anomalib_decad.command_line import names_model

NAMES = {"DecAD", "DecoupledUniAD"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--model", "DecAD"],
        ["train", "--model=DecoupledUniAD"],
        ["train", "--model", "anomalib.models.DecAD"],
        ["train", "--model.class_path", "anomalib_decad.DecAD"],
        ["train", "--model", "Padim", "--model", "DecAD"],
    ],
)
@pytest.mark.parametrize("program", ["anomalib", "/usr/bin/anomalib", "C:/Scripts/anomalib.exe"])
def test_ours(program, arguments):
    assert names_model([program, *arguments], NAMES)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["anomalib"],
        ["anomalib", "train", "--model"],
        ["anomalib", "train", "--model", "Padim", "--default_root_dir", "DecAD"],
        ["anomalib", "train", "--model", "DecAD", "--model", "Padim"],
        ["anomalib", "train", "--model", "other_package.DecAD"],
        ["anomalib", "train", "--config", "missing.yaml"],
        ["pytest", "--model", "DecAD"],
    ],
)
def test_others(command):
    assert not names_model(command, NAMES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: DecAD\n", True),
        ("seed: 1\nmodel:\n  class_path: anomalib_decad.DecAD\n", True),
        ('{"model": {"class_path": "DecAD"}}', True),
        ("model:\n  class_path: Padim\ndata: DecAD\n", False),
    ],
)
def test_configuration_files(text, expected, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert names_model(["anomalib", "train", "--config", str(path)], NAMES) is expected
    assert names_model(["anomalib", "train", f"--config={path}", "--model", "Padim"], NAMES) is False
