"""What is not printed."""

import logging
import warnings

import pytest

from anomalib_decad.quiet import (
    HARMLESS,
    HarmlessFilter,
    ignore_warnings,
    is_verbose,
    quieten_handlers,
    quieten_trained,
)


def is_printed(message, logger="anomalib.data", level=logging.INFO, log_filter=None):
    record = logging.LogRecord(logger, level, __file__, 1, message, (), None)
    return (log_filter or HarmlessFilter()).filter(record)


def test_each_entry_has_a_reason():
    assert all(entry.reason for entry in HARMLESS)


def test_only_what_is_known_is_dropped():
    assert not is_printed("Found the dataset.")
    assert is_printed("Found the dataset.", "another.package")
    assert is_printed("Found the dataset.", level=logging.WARNING)
    assert is_printed("A message")
    assert not is_printed("Replaced initializer", "onnx_ir.passes")
    assert is_printed("Replaced initializer", "onnx_irregular")


def test_warnings_of_the_package_are_said_once():
    log_filter = HarmlessFilter()
    said = [is_printed("odd", "anomalib_decad.data", logging.WARNING, log_filter) for _ in range(2)]
    others = [is_printed("odd", "anomalib.data", logging.WARNING, log_filter) for _ in range(2)]
    assert said == [True, False]
    assert others == [True, True]


def test_of_several_processes_the_first_speaks(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not is_printed("A message")
    assert is_printed("A message", level=logging.WARNING)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert is_printed("A message")


def test_python_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ignore_warnings()
        warnings.warn("It is recommended to use `self.log('bolts/image_AUROC', ..., sync_dist=True)`", stacklevel=1)
        warnings.warn("It is recommended to use `self.log('train_loss', ..., sync_dist=True)`", stacklevel=1)
    assert len(caught) == 1


def test_a_notebook_is_quiet_and_the_user_s_own_handlers_stay(monkeypatch):
    own, theirs = logging.StreamHandler(), logging.StreamHandler()
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "handlers", [theirs])
    monkeypatch.setattr(logging.getLogger(), "handlers", [own])
    monkeypatch.setenv("ANOMALIB_DECAD_VERBOSE", "1")
    quieten_handlers()
    assert not theirs.filters
    monkeypatch.delenv("ANOMALIB_DECAD_VERBOSE")
    quieten_handlers()
    quieten_handlers()
    assert [type(known) for known in theirs.filters] == [HarmlessFilter]
    assert not own.filters


def test_what_has_been_trained_needs_no_checkpoint(caplog):
    logger = logging.getLogger("anomalib.engine.engine")
    filters = list(logger.filters)
    try:
        logger.filters.clear()
        logger.warning("ckpt_path is not provided. Model weights will not be loaded.")
        assert len(caplog.messages) == 1
        quieten_trained()
        quieten_trained()
        assert len(logger.filters) == 1
        logger.warning("ckpt_path is not provided. Model weights will not be loaded.")
        logger.warning("another message")
        assert caplog.messages[1:] == ["another message"]
    finally:
        logger.filters[:] = filters


@pytest.mark.parametrize(
    ("value", "expected"), [("", False), ("0", False), ("false", False), ("1", True), ("yes", True)]
)
def test_verbose(value, expected, monkeypatch):
    monkeypatch.setenv("ANOMALIB_DECAD_VERBOSE", value)
    assert is_verbose() is expected
