# SPDX-License-Identifier: Apache-2.0
"""DecAD (ICCV 2025) as a model that plugs into an unmodified anomalib.

Importing the package imports nothing heavy: the names below are resolved on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from anomalib_decad import plugin

if TYPE_CHECKING:
    from anomalib_decad.data import MultiCategory
    from anomalib_decad.models.decad import DecAD, DecADModel
    from anomalib_decad.models.mambaad import DecoupledMambaAD
    from anomalib_decad.models.reverse_distillation import DecoupledReverseDistillation
    from anomalib_decad.models.uniad import DecoupledUniAD

__version__ = "0.1.0"
__all__ = [
    "DecAD",
    "DecADModel",
    "DecoupledMambaAD",
    "DecoupledReverseDistillation",
    "DecoupledUniAD",
    "MultiCategory",
]

_MODULES = {
    "DecAD": "anomalib_decad.models.decad",
    "DecADModel": "anomalib_decad.models.decad",
    "DecoupledMambaAD": "anomalib_decad.models.mambaad",
    "DecoupledReverseDistillation": "anomalib_decad.models.reverse_distillation",
    "DecoupledUniAD": "anomalib_decad.models.uniad",
    "MultiCategory": "anomalib_decad.data",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    try:
        module = importlib.import_module(_MODULES[name])
    except AttributeError as error:
        # It would pass for "has no such name", and the cause be lost.
        msg = f"{_MODULES[name]} cannot be imported: {error}"
        raise ImportError(msg) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Last, because it may load the names above. Torch makes the same call when it is imported
# (entry point group torch.backends), unless TORCH_DEVICE_BACKEND_AUTOLOAD=0.
plugin.install()
