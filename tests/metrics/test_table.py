"""The table of metrics on terminals and in files."""

import re

import pytest

from anomalib_decad.metrics import DECISIONS, CategoryEvaluator
from anomalib_decad.metrics.category_metrics import METRICS

NAMES = ("toothbrush", "transistor", "a_product_of_21_signs")


def report(folder, capsys):
    evaluator = CategoryEvaluator()
    row = dict.fromkeys(METRICS, 1.0)
    decisions = dict.fromkeys((*NAMES, "mean"), dict.fromkeys(DECISIONS, 1.0))
    evaluator.results = {name: {**row, "mAD": 1.0} for name in (*NAMES, "mean")}
    evaluator.decisions = decisions
    evaluator._write(folder)
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


@pytest.mark.parametrize("columns", ["60", "80", "120"])
@pytest.mark.parametrize("is_terminal", [False, True])
def test_nothing_is_cut(columns, is_terminal, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    output = report(tmp_path, capsys)
    assert "…" not in output
    assert output.count("100.0") == 13 * (len(NAMES) + 1)
    for name in NAMES if columns != "60" or not is_terminal else ():
        assert name in output
    if is_terminal:
        table = output[: output.index("Written to")]
        assert max(len(line.rstrip()) for line in table.splitlines()) <= int(columns)
