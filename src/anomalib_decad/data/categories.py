# SPDX-License-Identifier: Apache-2.0
"""Which categories there are, and one of anomalib's datamodules for each."""

import copy
import importlib
import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anomalib.data
import pandas as pd
from anomalib.data import AnomalibDataModule, Folder, Kaputt, RealIAD, Visa
from anomalib.utils.path import get_datasets_dir

from anomalib_decad.compat import rename_datamodule

__all__ = ["create_datamodules"]

logger = logging.getLogger(__name__)

_ARCHIVES = {".gz", ".tar", ".tgz", ".xz", ".zip"}  # may lie in a folder that a dataset is downloaded to

#: Names that tables and files have for something else, which a category of this name would be lost to.
_RESERVED = {"mean": "the mean over the categories", "unknown": "what is unlike every category"}


def create_datamodules(
    datamodule: str | type[AnomalibDataModule] | AnomalibDataModule | Sequence[AnomalibDataModule],
    categories: Sequence[str | int] | str | None,
    settings: dict[str, Any],
) -> dict[str, AnomalibDataModule]:
    """Create a datamodule for each category, by its name; arguments and errors are those of ``MultiCategory``."""
    categories = [categories] if isinstance(categories, str) else categories
    if not isinstance(datamodule, str | type) and settings:
        given = f"{type(datamodule).__name__} that is wrapped" if isinstance(datamodule, AnomalibDataModule) else "list"
        msg = f"{', '.join(settings)}: give these to the {given}"
        raise ValueError(msg)
    if isinstance(datamodule, Sequence) and not isinstance(datamodule, str):
        names = [str(name) for name in categories or [module.category or module.name for module in datamodule]]
        if not names or len(set(names)) != len(names) or len(names) != len(datamodule):
            msg = f"a list of {len(datamodule)} datamodules needs as many different category names, got {names}"
            raise ValueError(msg)
        datamodules = dict(zip(names, datamodule, strict=True))
    else:
        template = datamodule if isinstance(datamodule, AnomalibDataModule) else _create_template(datamodule, settings)
        datamodules = {name: _with_category(template, name) for name in _choose_categories(template, categories)}
    for name, what in _RESERVED.items():
        if name in datamodules:
            msg = f"a category cannot be called {name!r}, as {what} is: rename its folder"
            raise ValueError(msg)
    return datamodules


def _has_categories(cls: Any) -> bool:
    is_datamodule = inspect.isclass(cls) and issubclass(cls, AnomalibDataModule) and cls.__name__ != "MultiCategory"
    return is_datamodule and (cls is Folder or "category" in inspect.signature(cls).parameters)


def _find_class(datamodule: str | type[AnomalibDataModule]) -> type[AnomalibDataModule]:
    """Find a datamodule class that has categories, by its name or import path."""
    found: Any = datamodule
    if isinstance(datamodule, str):
        module, _, name = datamodule.rpartition(".")
        found = getattr(importlib.import_module(module or "anomalib.data"), name, None)
    if not _has_categories(found):
        problem = f"{found.__name__} has no categories" if inspect.isclass(found) else f"anomalib has no {datamodule!r}"
        valid = sorted(name for name in anomalib.data.__all__ if _has_categories(getattr(anomalib.data, name)))
        msg = f"datamodule: {problem}; those with categories are {', '.join(valid)}"
        raise ValueError(msg)
    return found


def _create_template(datamodule: str | type[AnomalibDataModule], settings: dict[str, Any]) -> AnomalibDataModule:
    """Create the datamodule that the categories' are copies of."""
    cls = _find_class(datamodule)
    parameters = inspect.signature(cls).parameters
    if unknown := [name for name in settings if name not in parameters]:
        msg = f"{cls.__name__} takes no {', '.join(unknown)}; it takes {', '.join(parameters)}"
        raise ValueError(msg)
    if issubclass(cls, RealIAD):
        # anomalib's default drops the normal test images, and with them the image metrics.
        settings = {"test_split_mode": "from_dir", **settings}
    if issubclass(cls, Folder):
        if "normal_dir" not in settings or "root" not in settings:
            msg = "Folder needs root, and datamodule_args with normal_dir: the folder of normal images in each category"
            raise ValueError(msg)
        settings = {"name": "", **settings}
    return cls(**settings)


def _with_category(template: AnomalibDataModule, category: str) -> AnomalibDataModule:
    """Copy a datamodule that was not set up yet for another category."""
    module = copy.deepcopy(template)
    if isinstance(module, Folder):
        module.root = Path(module.root or ".") / category
        rename_datamodule(module, category)
    module.category = category
    return module


def _is_without_images(datamodule: AnomalibDataModule) -> bool:
    """Tell whether the root of a datamodule does not exist, or has nothing but archives in it."""
    root = getattr(datamodule, "root", None)
    if root is None or not Path(root).is_dir():
        return root is not None
    entries = [entry for entry in Path(root).iterdir() if not entry.name.startswith(".")]
    return all(entry.is_file() and entry.suffix in _ARCHIVES for entry in entries)


def _choose_categories(template: AnomalibDataModule, categories: Sequence[str | int] | None) -> list[str]:
    """Check the names of categories, or find all: those in the root, or while it is empty those of the dataset."""
    cls, root = type(template), getattr(template, "root", "")
    defined, is_empty = _defined_categories(cls), _is_without_images(template)
    if is_empty and not Path(root).is_dir():
        default = getattr(inspect.signature(cls).parameters.get("root"), "default", None)
        is_default = Path(str(default)) == Path(root) or Path(root).parent == get_datasets_dir()
        if Path(root).exists() or not is_default:  # it may be mistyped
            remedy = f": make it for {cls.__name__} to be put or downloaded into it" if defined else ""
            msg = f"root: there is no folder {root}{remedy}"
            raise ValueError(msg)
    valid = defined if is_empty else _present_categories(template)
    if not valid and (categories is None or defined):
        folders = ", ".join(sorted(entry.name for entry in Path(str(root)).glob("*/"))[:20]) or "no folders"
        normal = " or ".join(_folders_of_normal(template))
        text = f"{cls.__name__}: no categories found in {root}, which has {folders}"
        msg = f"{text}: a category is a folder with {normal} in it"
        raise ValueError(msg)
    # YAML reads 01 as a number.
    by_number: dict[Any, str] = {int(name): name for name in valid if name.isdecimal()}
    names = valid if categories is None else [str(by_number.get(name, name)) for name in categories]
    problem = f"categories must be different: {names}" if len(set(names)) != len(names) else ""
    if wrong := [name for name in names if valid and name not in valid]:
        problem = f"no category {', '.join(map(repr, wrong))}"
    if problem or not names:
        text = f"{cls.__name__}: {problem or 'no categories are given'}"
        msg = f"{text}; valid names are {', '.join(valid) or 'unknown'}, those in {root}"
        raise ValueError(msg)
    return names


def _defined_categories(cls: type[AnomalibDataModule]) -> list[str]:
    """List the categories that a dataset defines: CATEGORIES beside anomalib's dataset of the same name."""
    try:
        module = importlib.import_module(cls.__module__.replace(".datamodules.", ".datasets."))
    except ModuleNotFoundError:
        return []
    return list(getattr(module, "CATEGORIES", ()))


def _folders_of_normal(template: AnomalibDataModule) -> list[str]:
    wanted = template.normal_dir if isinstance(template, Folder) else "train"
    return [str(wanted)] if isinstance(wanted, str | Path) else [str(name) for name in wanted]


def _present_categories(template: AnomalibDataModule) -> list[str]:
    """List the categories in the root, and say which of its folders are none."""
    if getattr(template, "root", None) is None:
        return []
    root = Path(template.root)  # type: ignore[attr-defined]
    defined = _defined_categories(type(template))
    if isinstance(template, Kaputt):
        try:
            table = pd.read_parquet(root / "datasets" / "query-train.parquet", columns=["item_material"])
        except (ImportError, OSError):  # which setup says
            return defined
        return sorted(table["item_material"].dropna().unique()) or defined
    if isinstance(template, RealIAD):  # its dataset takes no other names
        return sorted({entry.name for entry in root.glob(f"realiad_{template.resolution}/*")} & set(defined))
    if isinstance(template, Visa):
        # As it is distributed, or as anomalib copies it: with empty folders for the categories that are missing.
        original = {folder.name for folder in root.iterdir() if (folder / "Data" / "Images").is_dir()}
        return sorted(original | {file.parents[2].name for file in root.glob("visa_pytorch/*/train/*/*")})
    wanted = _folders_of_normal(template)
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    # A folder with a name of the dataset's is meant to be a category: what it lacks is said when it is read.
    present = [
        entry.name for entry in folders if entry.name in defined or any((entry / name).is_dir() for name in wanted)
    ]
    if present and (others := [entry.name for entry in folders if entry.name not in present]):
        logger.warning("%s: %s are no categories, as they have no %s.", root, ", ".join(others), " or ".join(wanted))
    return present
