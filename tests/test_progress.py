"""How far something is, on a terminal and in a file."""

import io
import logging

import pytest
from rich.console import Console

from anomalib_decad import progress
from anomalib_decad.progress import showing_progress


@pytest.fixture
def console(monkeypatch):
    def use(**kwargs):
        console = Console(file=io.StringIO(), width=80, **kwargs)
        monkeypatch.setattr(progress, "get_console", lambda: console)
        return console

    return use


def run(parts=20):
    with showing_progress("Working") as report:
        for index in range(parts):
            report((index + 1) / parts)


def test_a_bar_on_a_terminal(console):
    terminal = console(force_terminal=True)
    run()
    assert "100%" in terminal.file.getvalue()


def test_a_line_now_and_then_in_a_file(console, monkeypatch, caplog):
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    file = console(force_terminal=False)
    with caplog.at_level(logging.INFO):
        run()
    assert not file.file.getvalue()
    assert 5 < len(caplog.messages) < 12
    assert caplog.messages[0].startswith("Working: 10 % after")
    assert caplog.messages[-1].startswith("Working: took")


def test_what_is_quick_is_one_line(console, caplog):
    console(force_terminal=False)
    with caplog.at_level(logging.INFO):
        run()
    assert len(caplog.messages) == 1


def test_nothing_if_not_wanted(console, caplog):
    terminal = console(force_terminal=True)
    with caplog.at_level(logging.INFO), showing_progress("Working", enabled=False) as report:
        report(0.5)
    assert not caplog.messages
    assert not terminal.file.getvalue()
