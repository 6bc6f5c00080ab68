# SPDX-License-Identifier: Apache-2.0
"""What is different where a command of anomalib's is about one of this package's models."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from anomalib_decad.command_line.errors import line_of
from anomalib_decad.command_line.folders import Folders
from anomalib_decad.quiet import HarmlessFilter, ignore_warnings, is_verbose

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["extend"]

_PACKAGE = __name__.partition(".")[0]

#: Exit status of commands with wrong arguments, as the parser has it.
_WRONG_ARGUMENTS = 2

#: Exit status that shells give to what Ctrl-C has ended.
_INTERRUPTED = 130

#: Commands that need data, and a trained model, of which anomalib does not say so.
_WITH_DATA = {"fit", "test", "train", "validate"}
_WITH_MODEL = {"export", "predict", "test", "validate"}

#: Packages whose loggers have handlers of their own, so that a message appears there and in anomalib's.
_WITH_HANDLERS = {"lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics", "huggingface_hub"}


class _Run:
    """State of one command.

    Args:
        is_ours (bool): Whether it is about one of this package's models, as far as can be told before it is parsed.
    """

    def __init__(self, is_ours: bool) -> None:
        self.is_ours = is_ours
        self.is_quiet = False
        #: The last error of a class that the parser instantiated: the parser tells only its text.
        self.failure: Exception | None = None
        self.folders = Folders()

    def quieten(self) -> None:
        """Print each message once, and none that is harmless."""
        if not self.is_ours or self.is_quiet or is_verbose():
            return
        self.is_quiet = True
        ignore_warnings()
        root = logging.getLogger()
        is_terminal = bool(importlib.import_module("rich").get_console().is_terminal)
        rich_handler = importlib.import_module("rich.logging").RichHandler
        for handler in list(root.handlers):
            # anomalib adds both of them. Lines of one's own are for terminals, which wrap them.
            if isinstance(handler, rich_handler) != is_terminal:
                root.removeHandler(handler)
                continue
            if type(handler) is logging.StreamHandler:
                # The standard error is for warnings and for what ends the command.
                handler.setStream(sys.stdout)
            handler.addFilter(HarmlessFilter())
        for name in list(root.manager.loggerDict):
            logger = logging.getLogger(name)
            if name.partition(".")[0] in _WITH_HANDLERS and logger.handlers:
                logger.handlers.clear()
                logger.propagate = True

    def instantiate(self, class_type: type, *args: Any, **kwargs: Any) -> Any:
        """Instantiate a class for the parser, and remember its error."""
        try:
            return class_type(*args, **kwargs)
        except Exception as error:
            self.failure = error
            raise

    def fail(self, error: BaseException) -> None:
        """End a command: with a line if it was interrupted or the error raised on purpose, else with its traceback."""
        if not self.is_ours:
            return
        self.folders.remove_unused()
        if isinstance(error, KeyboardInterrupt):
            if not is_verbose():
                # A training says itself how to resume it.
                sys.stderr.write("Interrupted.\n")
                raise SystemExit(_INTERRUPTED) from None
            return
        cause = self.failure if self.failure is not None and str(self.failure) in str(error) else error
        line = None if is_verbose() else line_of(cause)
        if line is not None:
            sys.stderr.write(f"error: {line}\n")
            raise SystemExit(_WRONG_ARGUMENTS) from None
        if cause is not error:
            raise cause from None


_current: _Run | None = None


def extend(cli_module: ModuleType, is_ours: Callable[[], bool]) -> None:
    """Extend anomalib's command line.

    Args:
        cli_module (ModuleType): ``anomalib.cli.cli``.
        is_ours (Callable[[], bool]): Tells whether the command of the process is about one of this package's models.
    """
    main, configure = cli_module.main, cli_module.configure_logger
    cli = cli_module.AnomalibCLI
    prepare, instantiate_engine = cli.before_instantiate_classes, cli.instantiate_engine

    @functools.wraps(main)
    def run_main() -> Any:
        global _current
        _current = run = _Run(False)
        with suppress(Exception):
            run.is_ours = is_ours()
        try:
            return main()
        except (Exception, KeyboardInterrupt) as error:
            run.fail(error)
            raise
        finally:
            run.folders.release()
            _current = None

    @functools.wraps(configure)
    def configure_logger(*args: Any, **kwargs: Any) -> None:
        configure(*args, **kwargs)
        if _current is not None:
            with suppress(Exception):
                _current.quieten()

    @functools.wraps(prepare)
    def before_instantiate_classes(self: Any) -> None:
        prepare(self)
        if _current is not None:
            with suppress(Exception):
                _prepare_run(_current, self)
            _check_given(_current, self)

    @functools.wraps(instantiate_engine)
    def instantiate_engine_and_extend(self: Any) -> None:
        instantiate_engine(self)
        if _current is not None and _current.is_ours:
            self.engine.export = functools.partial(_export, self.engine.export)

    cli.instantiate_engine = instantiate_engine_and_extend
    cli_module.main = run_main  # type: ignore[attr-defined]
    cli_module.configure_logger = configure_logger  # type: ignore[attr-defined]
    cli.before_instantiate_classes = before_instantiate_classes


def _export(export: Callable[..., Any], model: Any, ckpt_path: Any = None, **kwargs: Any) -> Any:
    """Export a checkpoint with the parts that the user gives: anomalib loads it into a model of its own."""
    given = {name: getattr(model, name) or False for name in model.given_parts}
    if ckpt_path and given:
        model, ckpt_path = type(model).load_from_checkpoint(ckpt_path, **given), None
    return export(model=model, ckpt_path=ckpt_path, **kwargs)


def _check_given(run: _Run, cli: Any) -> None:
    """Ask for data and a checkpoint before weights are fetched."""
    if not run.is_ours:
        return
    command = str(cli.subcommand)
    config = cli.config.get(command) or {}
    if command in _WITH_DATA and not config.get("data"):
        msg = f"{command} needs images: give them with --data, as --data MultiCategory --data.root ..."
        raise ValueError(msg)
    if command in _WITH_MODEL and not config.get("ckpt_path"):
        msg = f"{command} needs a trained model: give the checkpoint of a training (--ckpt_path)"
        raise ValueError(msg)


def _prepare_run(run: _Run, cli: Any) -> None:
    """See what the parser has found, before the classes are instantiated."""
    config = cli.config.get(str(cli.subcommand)) or {}
    model = config.get("model") or {}
    run.is_ours = str(model.get("class_path")).partition(".")[0] == _PACKAGE
    if not run.is_ours:
        return
    run.quieten()
    cli.parser.add_instantiator(run.instantiate, object)
    run.folders.watch(sys.modules["anomalib.engine.engine"])
