# SPDX-License-Identifier: Apache-2.0
"""One datamodule for each category of a dataset: which there are, and how they are made."""

import copy
import importlib
import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anomalib.data
import pandas as pd
from anomalib.data import AnomalibDataModule, Folder, Kaputt, RealIAD, Visa
from anomalib.utils.path import get_datasets_dir

from anomalib_decad.compat import rename_datamodule

__all__ = ["create_datamodules", "describe_download", "is_without_images"]

logger = logging.getLogger(__name__)

#: What may lie in a folder that a dataset is about to be downloaded to.
_ARCHIVES = {".gz", ".tar", ".tgz", ".xz", ".zip"}

#: Names that tables and files have for something else, which a category of this name would be lost to.
_RESERVED = {"mean": "the mean over the categories", "unknown": "what is unlike every category"}


def create_datamodules(
    datamodule: str | type[AnomalibDataModule] | AnomalibDataModule | Sequence[AnomalibDataModule],
    categories: Sequence[str | int] | str | None,
    settings: dict[str, Any],
) -> dict[str, AnomalibDataModule]:
    """Create a datamodule for each category.

    Args:
        datamodule (str | type[AnomalibDataModule] | AnomalibDataModule | Sequence[AnomalibDataModule]): As for
            ``MultiCategory``.
        categories (Sequence[str | int] | str | None): As for ``MultiCategory``.
        settings (dict[str, Any]): Arguments of the datamodule.

    Returns:
        dict[str, AnomalibDataModule]: The datamodules by the names of their categories.

    Raises:
        ValueError: If a name, an argument or the root is wrong; the message lists the valid ones.
    """
    datamodules = _create(datamodule, [categories] if isinstance(categories, str) else categories, settings)
    for name, what in _RESERVED.items():
        if name in datamodules:
            msg = f"a category cannot be called {name!r}, as {what} is: rename its folder"
            raise ValueError(msg)
    return datamodules


def _create(
    datamodule: str | type[AnomalibDataModule] | AnomalibDataModule | Sequence[AnomalibDataModule],
    categories: Sequence[str | int] | None,
    settings: dict[str, Any],
) -> dict[str, AnomalibDataModule]:
    if isinstance(datamodule, Sequence) and not isinstance(datamodule, str):
        return _name_datamodules(datamodule, categories, settings)
    if isinstance(datamodule, AnomalibDataModule):
        if settings:
            msg = f"{', '.join(settings)}: give these to the {type(datamodule).__name__} that is wrapped"
            raise ValueError(msg)
        template = datamodule
    else:
        template = _create_template(_find_class(datamodule), settings)
    names = _choose_categories(template, categories)
    return {name: _with_category(template, name) for name in names}


def is_without_images(datamodule: AnomalibDataModule) -> bool:
    """Tell whether the root of a datamodule does not exist, or has nothing but archives in it."""
    root = getattr(datamodule, "root", None)
    if root is None or not Path(root).is_dir():
        return root is not None
    entries = [entry for entry in Path(root).iterdir() if not entry.name.startswith(".")]
    return all(entry.is_file() and entry.suffix in _ARCHIVES for entry in entries)


def describe_download(datamodule: AnomalibDataModule) -> str | None:
    """Say what a datamodule will download.

    Args:
        datamodule (AnomalibDataModule): The datamodule.

    Returns:
        str | None: A sentence; ``None`` if its dataset has no address that anomalib would download it from.
    """
    module: Any = importlib.import_module(type(datamodule).__module__)
    info = getattr(module, "DOWNLOAD_INFO", None)
    name, root = type(datamodule).__name__, getattr(datamodule, "root", None)
    if info is not None:
        return f"{root} has no images: downloading all of {name} into it, from {info.url}"
    urls = getattr(module, "DOWNLOAD_URLS", {})
    if isinstance(urls, Mapping) and datamodule.category in urls:
        return f"{root} has no images: downloading {name} {datamodule.category} into it"
    return None


def _name_datamodules(
    datamodules: Sequence[AnomalibDataModule], categories: Sequence[str | int] | None, settings: dict[str, Any]
) -> dict[str, AnomalibDataModule]:
    """Take a list of datamodules for the categories."""
    if settings:
        msg = f"{', '.join(settings)}: give these to the datamodules of the list"
        raise ValueError(msg)
    names = (
        [str(name) for name in categories] if categories else [module.category or module.name for module in datamodules]
    )
    if not names or len(set(names)) != len(names) or len(names) != len(datamodules):
        msg = f"a list of {len(datamodules)} datamodules needs as many different category names, got {names}"
        raise ValueError(msg)
    return dict(zip(names, datamodules, strict=True))


def _find_class(datamodule: str | type[AnomalibDataModule]) -> type[AnomalibDataModule]:
    """Find a datamodule class by its name or import path."""
    if not isinstance(datamodule, str):
        return datamodule
    module, _, name = datamodule.rpartition(".")
    try:
        found = getattr(importlib.import_module(module) if module else anomalib.data, name, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks another one
        found = None
    if not (inspect.isclass(found) and issubclass(found, AnomalibDataModule)):
        msg = f"datamodule: anomalib has no {datamodule!r}; those with categories are {', '.join(_with_categories())}"
        raise ValueError(msg)
    return found


def _with_categories() -> list[str]:
    """List anomalib's datamodules that can be wrapped."""
    classes = (getattr(anomalib.data, name) for name in anomalib.data.__all__ if name != "MultiCategory")
    return sorted(
        cls.__name__
        for cls in classes
        if inspect.isclass(cls)
        and issubclass(cls, AnomalibDataModule)
        and (cls is Folder or "category" in inspect.signature(cls).parameters)
    )


def _create_template(cls: type[AnomalibDataModule], settings: dict[str, Any]) -> AnomalibDataModule:
    """Create the datamodule that the categories' are copies of."""
    parameters = inspect.signature(cls).parameters
    if cls is not Folder and "category" not in parameters:
        msg = f"datamodule: {cls.__name__} has no categories; those that have are {', '.join(_with_categories())}"
        raise ValueError(msg)
    unknown = [name for name in settings if name not in parameters]
    if unknown:
        msg = f"{cls.__name__} takes no {', '.join(unknown)}; it takes {', '.join(parameters)}"
        raise ValueError(msg)
    if issubclass(cls, RealIAD):
        # anomalib's default drops the normal test images, and with them the image metrics.
        settings = {"test_split_mode": "from_dir", **settings}
    if issubclass(cls, Folder):
        if "normal_dir" not in settings or "root" not in settings:
            msg = "Folder needs root, and datamodule_args with normal_dir: the folder of normal images in each category"
            raise ValueError(msg)
        return cls(name="", **settings)
    return cls(**settings)


def _choose_categories(template: AnomalibDataModule, categories: Sequence[str | int] | None) -> list[str]:
    """Check the names of categories, or find all.

    What is in the root counts. The names that the dataset defines count only while there is nothing in it.
    """
    name, root = type(template).__name__, getattr(template, "root", None)
    valid = _present_categories(template)
    if is_without_images(template):
        _check_missing_root(template)
        valid = _defined_categories(type(template))
    elif not valid and _defined_categories(type(template)):
        folders = sorted(entry.name for entry in Path(str(root)).iterdir() if entry.is_dir())
        msg = (
            f"{name}: no categories found in {root}, which has {', '.join(folders[:20]) or 'no folders'}: "
            f"a category is a folder {_describe_layout(template)}"
        )
        raise ValueError(msg)
    names = list(valid) if categories is None else [_find_name(category, valid) for category in categories]
    wrong = [name for name in names if name not in valid] if valid else []
    if not names or wrong or len(set(names)) != len(names):
        problem = f"no category {', '.join(map(repr, wrong))}" if wrong else f"categories must be different: {names}"
        if not names:
            problem = f"no categories found in {root}: a category is a folder {_describe_layout(template)}"
        msg = f"{name}: {problem}; valid names are {', '.join(valid) or 'unknown'}, those in {root}"
        raise ValueError(msg)
    return names


def _check_missing_root(template: AnomalibDataModule) -> None:
    """Refuse a root that does not exist, unless it is the dataset's own: it may be mistyped."""
    root = Path(template.root)  # type: ignore[attr-defined]
    parameter = inspect.signature(type(template)).parameters.get("root")
    default = parameter.default if parameter else None
    is_default = (isinstance(default, str | Path) and Path(default) == root) or root.parent == get_datasets_dir()
    if not root.is_dir() and (root.exists() or not is_default):
        remedy = (
            f": make it to have {type(template).__name__} downloaded into it" if describe_download(template) else ""
        )
        msg = f"root: there is no folder {root}{remedy}"
        raise ValueError(msg)


def _find_name(category: str | int, valid: Sequence[str]) -> str:
    """Find the name of a category that may be a number: YAML reads 01 as one."""
    if isinstance(category, int):
        return next((name for name in valid if name.isdecimal() and int(name) == category), str(category))
    return category


def _defined_categories(cls: type[AnomalibDataModule]) -> list[str]:
    """List the categories that a dataset defines: CATEGORIES beside anomalib's dataset of the same name."""
    try:
        module = importlib.import_module(cls.__module__.replace(".datamodules.", ".datasets."))
    except ModuleNotFoundError:
        return []
    return list(getattr(module, "CATEGORIES", ()))


def _describe_layout(template: AnomalibDataModule) -> str:
    """Say how a category is told from other folders."""
    if isinstance(template, RealIAD):
        return f"of the dataset's in realiad_{template.resolution}"
    return f"with {' or '.join(map(str, _folders_of_normal(template)))} in it"


def _folders_of_normal(template: AnomalibDataModule) -> list[str | Path]:
    wanted = template.normal_dir if isinstance(template, Folder) else "train"
    return [wanted] if isinstance(wanted, str | Path) else list(wanted)


def _present_categories(template: AnomalibDataModule) -> list[str]:
    """List the categories in the root, and say which of its folders are none."""
    root = getattr(template, "root", None)
    if root is None or not Path(root).is_dir():
        return []
    root = Path(root)
    defined = _defined_categories(type(template))
    if isinstance(template, Kaputt):
        return _kaputt_categories(root) or defined
    if isinstance(template, RealIAD):
        folder = root / f"realiad_{template.resolution}"
        # Its dataset takes no other names.
        return sorted(entry.name for entry in folder.iterdir() if entry.name in defined) if folder.is_dir() else []
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
    others = [entry.name for entry in folders if entry.name not in present]
    if present and others:
        logger.warning("%s: %s are no categories: a category is a folder %s.", root, ", ".join(others[:20]),
                       _describe_layout(template))  # fmt: skip
    return present


def _kaputt_categories(root: Path) -> list[str]:
    """List the materials in Kaputt's table of training images; none if it cannot be read, which setup says."""
    try:
        materials = pd.read_parquet(root / "datasets" / "query-train.parquet", columns=["item_material"])
    except (ImportError, OSError):
        return []
    return sorted(materials["item_material"].dropna().unique())


def _with_category(template: AnomalibDataModule, category: str) -> AnomalibDataModule:
    """Copy a datamodule that was not set up yet for another category."""
    module = copy.deepcopy(template)
    if isinstance(module, Folder):
        module.root = Path(module.root or ".") / category
        rename_datamodule(module, category)
    module.category = category
    return module
