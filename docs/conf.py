# SPDX-License-Identifier: Apache-2.0
"""The documents as a site: `make docs` builds it into build/docs.

Each document is written once, for the view of the repository, and its links are those of files there. What the site has
no page for becomes a download, or a plain name if it is a folder. The project's other documents, and a page of the
interface for each room of the package, are copied to docs/generated/.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
sys.path.insert(0, str(ROOT / "src"))
# A build needs no hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other

project = "anomalib-decad"
project_copyright = "anomalib-decad contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "anomalib-decad"
myst_heading_anchors = 3
exclude_patterns = ["_build"]
suppress_warnings = ["myst.header"]  # a changelog's and notes' own order of headings
# Docstrings say the types, with ranges and shapes.
autodoc_typehints = "none"
autodoc_member_order = "groupwise"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}

#: Documents outside docs/, and the names of their pages.
PAGES = {
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "benchmarks/NOTES.md": "notes",
    **{
        f"src/anomalib_decad/models/{path.parent.name}/README.md": f"model-{path.parent.name.replace('_', '-')}"
        for path in sorted((ROOT / "src/anomalib_decad/models").glob("*/README.md"))
    },
}
#: Rooms that nobody calls.
_INNER = ("compat",)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def relink(text: str, origin: Path, page: Path) -> str:
    """Turn a document's links into those of its page.

    Args:
        text (str): The document.
        origin (Path): Folder that its links start from.
        page (Path): Folder that the page is in.
    """

    def replace(match: re.Match[str]) -> str:
        image, label, link = match.groups()
        path, _, fragment = link.partition("#")
        if "://" in link or not path:
            return match.group()
        target = (origin / path).resolve()
        name = target.relative_to(ROOT).as_posix()
        if target == ROOT / "README.md":
            target = DOCS / "index.md"
        elif name in PAGES:
            target = GENERATED / f"{PAGES[name]}.md"
        elif target.is_dir():
            return label if label.startswith("`") else f"{label} (`{name}`)"
        where = os.path.relpath(target, page) + (f"#{fragment}" if fragment else "")
        if image or target.suffix == ".md":
            return f"{image}[{label}]({where})"
        return f"{{download}}`{label.strip('`')} <{where}>`"

    return _LINK.sub(replace, text)


def generate() -> None:
    """Write the pages of what lies outside docs/."""
    GENERATED.mkdir(exist_ok=True)
    for path in GENERATED.glob("*.md"):
        path.unlink()  # what was there before may be gone
    for name, page in PAGES.items():
        path = ROOT / name
        write(page, relink(path.read_text(encoding="utf-8"), path.parent, GENERATED))
    found = sorted(path.parent.name for path in (ROOT / "src/anomalib_decad").glob("*/__init__.py"))
    rooms = [f"anomalib_decad.{name}" for name in found if name not in _INNER]
    described: set[int] = set()
    # The package itself last: what it has of its rooms is described there.
    for name in [*rooms, "anomalib_decad"]:
        module = importlib.import_module(name)
        names = list(getattr(module, "__all__", ()))
        twice = [member for member in names if id(getattr(module, member)) in described]
        described |= {id(getattr(module, member)) for member in names}
        if names:
            option = f"\n   :exclude-members: {', '.join(twice)}" if twice else ""
            write(f"api-{name}", f"# `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}{option}\n```\n")


def write(page: str, text: str) -> None:
    """Write a page, unless it is there: what has not changed is not built again."""
    path = GENERATED / f"{page}.md"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


generate()


def setup(app: Any) -> None:
    """Rewrite the links of each document in docs/ when it is read."""

    def read(_: Any, docname: str, source: list[str]) -> None:
        if not docname.startswith("generated/"):
            source[0] = relink(source[0], DOCS, DOCS)

    app.connect("source-read", read)
