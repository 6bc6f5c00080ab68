# SPDX-License-Identifier: Apache-2.0
"""Makes an unmodified anomalib find the models and datamodules of installed packages.

anomalib has no plug-in mechanism: ``--model NAME`` finds only classes that were imported before its command line is
parsed, and ``get_model`` only imports from ``anomalib.models``. Two entry point groups close that gap:

- ``anomalib.models`` and ``anomalib.data`` are the registry, plain data: ``DecAD = "anomalib_decad:DecAD"``.
- ``torch.backends`` is the trigger: ``import torch`` calls :func:`install`, and anomalib imports torch. The classes are
  added to ``anomalib.models`` and ``anomalib.data`` once these have been imported.

It uses the standard library only and never raises: a plug-in that cannot be imported is a warning.
"""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from types import ModuleType
from typing import Any

__all__ = ["install"]

#: Entry point group, which is also the module to wait for, and the modules that get its classes.
_TARGETS = {"anomalib.models": ("anomalib.models", "anomalib.models.image"), "anomalib.data": ("anomalib.data",)}

_attached, _warned = set[str](), set[str]()


def install() -> None:
    """Add the registered classes to anomalib, now or once anomalib has been imported; calling it again is safe."""
    try:
        if "anomalib" in sys.modules:
            _watch(sys.modules["anomalib"])
        elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception as error:
        _warn("anomalib-decad", error)


class _Finder:
    """Meta path finder that finds nothing, but notices when a part of anomalib is about to be imported."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        del path, target
        if fullname in _TARGETS:
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            install()


class _WatchedPackage(ModuleType):
    """The package ``anomalib``: Python sets a submodule as its attribute once the submodule has been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if f"anomalib.{name}" in _TARGETS:
            _watch(self)


def _watch(package: ModuleType) -> None:
    """Extend the parts of anomalib that have been imported, and wait for the others."""
    missing = [group for group in _TARGETS if not hasattr(package, group.rpartition(".")[2])]
    package.__class__ = _WatchedPackage if missing else ModuleType
    for group in _TARGETS:
        if group not in missing and group not in _attached:
            _attached.add(group)
            try:
                _attach(group)
            except Exception as error:
                _warn(group, error)


def _attach(group: str) -> None:
    """Add the classes of an entry point group to anomalib's modules; an existing name stays what it is."""
    modules = [sys.modules[name] for name in _TARGETS[group] if name in sys.modules]
    found = importlib.metadata.entry_points(group=group)
    entries = [entry for entry in found if not any(hasattr(module, entry.name) for module in modules)]
    later = {}
    for entry in entries:
        package = entry.module.partition(".")[0]
        try:
            # A package that is importing anomalib right now is not complete: its classes are loaded on first use.
            if any(_is_importing(module) for module in list(sys.modules) if module.startswith(f"{package}.")):
                later[entry.name] = entry
            else:
                for module in modules:
                    setattr(module, entry.name, entry.load())
        except Exception as error:
            _warn(package, error)
            continue
        # get_model imports only from modules in this set.
        vars(modules[0]).get("ALLOWED_MODULES", set()).add(entry.module)
        for module in modules:
            vars(module)["__all__"] = [*module.__all__, entry.name]

    def load(name: str) -> Any:  # PEP 562
        if name not in later:
            msg = f"module {group!r} has no attribute {name!r}"
            raise AttributeError(msg)
        return later[name].load()

    for module in modules if later else ():
        module.__getattr__ = load  # type: ignore[method-assign]


def _is_importing(name: str) -> bool:
    """Tell whether the import of a submodule has begun, but not ended."""
    parent, _, child = name.rpartition(".")
    return parent in sys.modules and not hasattr(sys.modules[parent], child)


def _warn(package: str, error: Exception) -> None:
    """Say once for each package why its classes are missing."""
    if package not in _warned:
        _warned.add(package)
        message = f"{package} is installed but cannot be used in anomalib: {type(error).__name__}: {error}"
        try:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        except RuntimeWarning:  # a filter turns warnings into errors
            sys.stderr.write(f"warning: {message}\n")
