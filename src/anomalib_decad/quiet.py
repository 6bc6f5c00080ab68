# SPDX-License-Identifier: Apache-2.0
"""What is known to be harmless is not printed where one of this package's models runs from the command line.

:data:`HARMLESS` is all of it, each with the reason. ``ANOMALIB_DECAD_VERBOSE=1`` brings everything back.

This module imports the standard library only.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from dataclasses import dataclass

__all__ = [
    "HARMLESS",
    "VERBOSE",
    "Harmless",
    "HarmlessFilter",
    "ignore_warnings",
    "is_verbose",
    "quieten_handlers",
    "quieten_trained",
]

#: Environment variable that brings all messages and tracebacks back.
VERBOSE = "ANOMALIB_DECAD_VERBOSE"

_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class Harmless:
    """A message that says nothing to the user of this package's models.

    Args:
        message (str): Regular expression that the message begins with.
        reason (str): Why it is harmless.
        logger (str | None): Logger of the message, or one above it; an empty string for any. ``None`` for a Python
            warning.
        level (int): The highest level of such messages.
            Defaults to ``logging.INFO``.
    """

    message: str
    reason: str
    logger: str | None = None
    level: int = logging.INFO


HARMLESS = (
    # Python warnings.
    Harmless(r"Importing from timm\.models\.layers is deprecated", "an import of anomalib's, which works"),
    Harmless(r"The anomalib\.models\.components\.dinov2 package is deprecated", "anomalib imports it itself"),
    Harmless(r"`isinstance\(treespec, LeafSpec\)` is deprecated", "Lightning's own use of torch, which works"),
    Harmless(r"Found \d+ module\(s\) in eval mode at the start of training", "the frozen encoder, on purpose"),
    Harmless("The dirpath has changed from", "each run has a folder of its own, and the best model stays known"),
    Harmless("`max_epochs` was not set. Setting it to 1000", "the models train for max_steps then, and say so"),
    Harmless(
        r"The '\w+_dataloader' does not have many workers",
        "the number of workers follows from the cores, or was asked for",
    ),
    Harmless("'pin_memory' argument is set as true but no accelerator is found", "anomalib asks for it everywhere"),
    Harmless("You have overridden `on_before_batch_transfer` in `LightningModule`", "anomalib's datamodules have none"),
    Harmless(
        r"It is recommended to use `self\.log\('[^']*(AUROC|AP|F1Max|AUPRO|mean_of_seven)'",
        "the metrics have been gathered, and are the same in all processes",
    ),
    # Messages of loggers.
    Harmless("", "each step of torch's conversion to ONNX, thousands of them", "onnx_ir"),
    Harmless("", "each step of torch's conversion to ONNX", "onnxscript"),
    Harmless("OpenVINO is possibly not installed", "an extra that the other commands do not need", "anomalib"),
    Harmless(r"Initializing \w+ model", "the command names the model", "anomalib.models"),
    Harmless("Loading the callbacks", "nothing follows from it", "anomalib.callbacks"),
    Harmless(r"Overriding num_sanity_val_steps", "the models set it, on purpose", "anomalib.engine"),
    Harmless("Found the dataset", "MultiCategory says how many images it has", "anomalib.data"),
    Harmless(r"Loaded .*from checkpoint", "the path is one of the arguments", "timm"),
    Harmless(r"Resized position embedding", "encoders take images of other sizes, on purpose", "timm"),
    Harmless(r".*litlogger", "an advertisement", ""),
    Harmless(
        "The following callbacks returned in `LightningModule.configure_callbacks` will override",
        "anomalib's models bring their callbacks to each stage of a run",
        "",
    ),
    Harmless("Loading `train_dataloader` to estimate", "the learning rate falls over the whole training", ""),
)


# Lightning's loggers have handlers of their own outside anomalib's command line.
_LOGGERS_WITH_HANDLERS = ("lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric", "pytorch_lightning")


def is_verbose() -> bool:
    """Tell whether the user wants all messages and tracebacks.

    Returns:
        bool: Whether the environment variable :data:`VERBOSE` is set, and neither empty nor 0.
    """
    return os.environ.get(VERBOSE, "").strip().lower() not in {"", "0", "false", "no"}


def ignore_warnings() -> None:
    """Ignore the Python warnings that are harmless, from now on."""
    for entry in HARMLESS:
        if entry.logger is None:
            warnings.filterwarnings("ignore", message=entry.message)


def quieten_handlers() -> None:
    """Keep what is harmless from the handlers that the libraries' loggers have, as in a notebook.

    The handlers of the root logger are the user's own, and stay as they are. Nothing changes if the user wants all
    messages.
    """
    if is_verbose():
        return
    ignore_warnings()
    for name in _LOGGERS_WITH_HANDLERS:
        for handler in logging.getLogger(name).handlers:
            # Lightning's own kind: others, as those of a test, want to see all.
            if type(handler) is logging.StreamHandler and not any(
                isinstance(known, HarmlessFilter) for known in handler.filters
            ):
                handler.addFilter(HarmlessFilter())


def quieten_trained() -> None:
    """Drop anomalib's warning that no weights are loaded, in a process that has trained some."""
    logger = logging.getLogger("anomalib.engine.engine")
    if not is_verbose() and _drop_no_checkpoint not in logger.filters:
        logger.addFilter(_drop_no_checkpoint)


def _drop_no_checkpoint(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("ckpt_path is not provided")


class HarmlessFilter(logging.Filter):
    """Filter of a handler that drops harmless messages, and the repetitions of this package's warnings."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a message is printed.

        Args:
            record (logging.LogRecord): The message.

        Returns:
            bool: Whether it is neither harmless nor a repetition.
        """
        # Of several processes, the first says it.
        if record.levelno <= logging.INFO and os.environ.get("LOCAL_RANK", "0") != "0":
            return False
        message = record.getMessage()
        if any(_matches(entry, record, message) for entry in HARMLESS):
            return False
        # What is odd about the data is odd in every epoch.
        if record.levelno >= logging.WARNING and _is_from(record, _PACKAGE):
            if message in self._said:
                return False
            self._said.add(message)
        return True


def _matches(entry: Harmless, record: logging.LogRecord, message: str) -> bool:
    return (
        entry.logger is not None
        and record.levelno <= entry.level
        and _is_from(record, entry.logger)
        and re.match(entry.message, message) is not None
    )


def _is_from(record: logging.LogRecord, logger: str) -> bool:
    return not logger or record.name == logger or record.name.startswith(f"{logger}.")
