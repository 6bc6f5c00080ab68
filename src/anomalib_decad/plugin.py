# SPDX-License-Identifier: Apache-2.0
"""Makes an unmodified anomalib see the models and datamodules of installed packages.

anomalib has no plug-in mechanism: ``--model NAME`` finds only classes that were imported before its command line is
parsed, and ``get_model`` only imports from ``anomalib.models``. Two entry point groups close that gap:

- ``anomalib.models`` and ``anomalib.data`` are the registry, plain data: ``DecAD = "anomalib_decad:DecAD"``.
- ``torch.backends`` is the trigger: ``import torch`` calls :func:`install`, and anomalib imports torch. :func:`install`
  waits until ``anomalib.models`` and ``anomalib.data`` have been imported and then adds each class of the registry.

Two more things are put right on the way. anomalib 2.7 accepts ``--seed_everything N`` and forgets it: for the models of
the registry, and only for these, the seed is set before the classes are instantiated, as the option's help has it. And
commands with this package's own models are quiet, and say errors in one line: see :mod:`anomalib_decad.command_line`.

This module uses the standard library only, and nothing that it does raises: a plug-in that cannot be imported is a
warning, and anomalib goes on without it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
import warnings
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

from anomalib_decad import command_line
from anomalib_decad.compat import is_importing, marks_as_imported
from anomalib_decad.quiet import ignore_warnings, is_verbose

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import ModuleType

__all__ = ["install"]

#: Entry point group, which is also the module to wait for -> the modules that get its classes.
_TARGETS = {
    "anomalib.models": ("anomalib.models", "anomalib.models.image"),
    "anomalib.data": ("anomalib.data",),
}

#: Functions of these modules that look for classes that exist.
_LOOKUPS = {"anomalib.models": ("list_models", "get_model"), "anomalib.data": ("get_datamodule",)}

_CLI = "anomalib.cli.cli"

_done: set[str] = set()
_pending: list[tuple[importlib.metadata.EntryPoint, Sequence[ModuleType]]] = []
_warned: set[str] = set()


def install() -> None:
    """Add the registered classes to anomalib, now or as soon as anomalib has been imported.

    Calling it again does nothing. It never raises.
    """
    try:
        if not any(isinstance(finder, _AnomalibFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _AnomalibFinder())
            if _is_our_command() and not is_verbose():
                ignore_warnings()  # of anomalib's own imports
        for name in (*_TARGETS, _CLI):
            if is_importing(name):  # anomalib.models imports torch, and so calls this, in its first lines
                sys.modules[name].__spec__.__class__ = _NotifyingSpec
            elif name in sys.modules:
                _extend(name)
    except Exception as error:
        _warn("anomalib-decad", error)


class _AnomalibFinder:
    """Meta path finder that lets anomalib's modules load as usual, and has the registered classes added behind that."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TARGETS and fullname != _CLI:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec = find_spec(fullname, path, target)
            if spec is not None:
                spec.__class__ = _NotifyingSpec
                return spec
        return None


class _NotifyingSpec(ModuleSpec):
    """Module spec that notices when the import system marks its module as imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if marks_as_imported(name, value):
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            if self.name in sys.modules:
                _extend(self.name)


def _extend(name: str) -> None:
    """Extend one of anomalib's modules, once."""
    if name in _done:
        return
    _done.add(name)
    try:
        if name == _CLI:
            _load_pending()
            _honor_seed(sys.modules[name])
            command_line.extend(sys.modules[name], _is_our_command)
        else:
            _attach(name)
    except Exception as error:
        _warn(name, error)


def _attach(group: str) -> None:
    """Add the classes that are registered under an entry point group to anomalib's modules."""
    modules = [sys.modules[name] for name in _TARGETS[group] if name in sys.modules]
    entries = {entry.name: entry for entry in _registered(group) if not any(hasattr(m, entry.name) for m in modules)}
    for module in modules:
        _add_names(module, entries)
    for entry in entries.values():
        # get_model imports only from modules in this set.
        vars(modules[0]).get("ALLOWED_MODULES", set()).add(entry.module)
    _pending.extend((entry, modules) for entry in entries.values())
    # Whoever imports one part of a package wants that part alone: the rest waits until somebody looks for it.
    if any(_is_importing_part_of(entry.module.partition(".")[0]) for entry in entries.values()):
        for name in _LOOKUPS[group]:
            _load_before(modules[0], name)
    else:
        _load_pending()


def _is_our_command() -> bool:
    """Tell whether the process is a command of anomalib's about one of this package's own models."""
    package = __name__.partition(".")[0]
    names = {entry.name for entry in _registered("anomalib.models") if entry.module.partition(".")[0] == package}
    return command_line.names_model(sys.argv, names)


def _is_importing_part_of(package: str) -> bool:
    return any(is_importing(name) for name in list(sys.modules) if name.startswith(f"{package}."))


def _load_before(module: ModuleType, name: str) -> None:
    """Have the classes that wait imported before a function of anomalib's looks for them."""
    original = getattr(module, name)

    @functools.wraps(original)
    def load_and_call(*args: Any, **kwargs: Any) -> Any:
        _load_pending()
        return original(*args, **kwargs)

    setattr(module, name, load_and_call)


def _load_pending() -> None:
    """Import the classes now: anomalib's command line and ``list_models`` only see classes that exist."""
    while _pending:
        _load(*_pending.pop(0))


def _registered(group: str) -> Iterable[importlib.metadata.EntryPoint]:
    """List the entry points of a group."""
    return _all_entry_points().select(group=group)


@functools.cache
def _all_entry_points() -> Any:
    # Once for all groups: it reads a file of every installed package.
    return importlib.metadata.entry_points()


def _add_names(module: ModuleType, entries: dict[str, importlib.metadata.EntryPoint]) -> None:
    """Make ``module.NAME`` import the class on first use, as PEP 562 has it."""
    inherited = getattr(module, "__getattr__", None)

    def module_getattr(name: str) -> Any:
        if name in entries:
            value = entries[name].load()
            setattr(module, name, value)
            return value
        if inherited is not None:
            return inherited(name)
        msg = f"module {module.__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)

    module.__getattr__ = module_getattr  # type: ignore[method-assign]
    if hasattr(module, "__all__"):
        vars(module)["__all__"] = [*module.__all__, *entries]


def _load(entry: importlib.metadata.EntryPoint, modules: Sequence[ModuleType]) -> None:
    """Import a class; if that fails, take its name back and say why."""
    try:
        entry.load()
    except Exception as error:
        # A package that is being imported right now, and so imported anomalib, is not broken: its class
        # exists when its import ends, and the module __getattr__ finds it from then on.
        package = entry.module.partition(".")[0]
        if any(is_importing(name) for name in list(sys.modules) if name.partition(".")[0] == package):
            return
        for module in modules:
            if entry.name in getattr(module, "__all__", ()):
                vars(module)["__all__"] = [name for name in module.__all__ if name != entry.name]
        _warn(package, error)


def _honor_seed(cli_module: ModuleType) -> None:
    """Have ``--seed_everything N`` seed the runs of registered models."""
    cli = cli_module.AnomalibCLI
    packages = {entry.module.partition(".")[0] for entry in _registered("anomalib.models")}
    original = cli.before_instantiate_classes

    @functools.wraps(original)
    def before_instantiate_classes(self: Any) -> None:
        config = self.config.get(str(self.subcommand)) or {}
        seed, model = config.get("seed_everything"), config.get("model") or {}
        is_ours = str(model.get("class_path")).partition(".")[0] in packages
        if is_ours and isinstance(seed, int) and not isinstance(seed, bool):
            importlib.import_module("lightning.pytorch").seed_everything(seed, workers=True)
        original(self)

    cli.before_instantiate_classes = before_instantiate_classes


def _warn(package: str, error: Exception) -> None:
    """Say once per package why its classes are missing."""
    if package in _warned:
        return
    _warned.add(package)
    message = f"{package} is installed but cannot be used in anomalib: {type(error).__name__}: {error}"
    # A filter that turns warnings into errors must not make a broken plug-in break anomalib.
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        sys.stderr.write(f"warning: {message}\n")
