# SPDX-License-Identifier: Apache-2.0
"""Many files as a few tar files of a limited size, with a list of what is in them. Standard library only."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["CONTENTS", "find", "read", "write"]

#: Name of the list.
CONTENTS = "contents.json"

_FOLDERS = ("wheels", "weights", "hub", "data")
_BLOCK = tarfile.BLOCKSIZE


def write(files: Sequence[tuple[str, Path]], output: Path, limit: int, facts: dict[str, Any]) -> list[Path]:
    """Write files into parts, in their order, and a list of them beside; parts that are there already are removed.

    Args:
        files (Sequence[tuple[str, Path]]): Name in the part, and path, of each file.
        output (Path): Folder of the parts.
        limit (int): Number of bytes that a part may have.
        facts (dict[str, Any]): What else the list says.

    Returns:
        list[Path]: The parts.

    Raises:
        SystemExit: If a file is larger than a part.
    """
    for name, path in files:
        size = path.stat().st_size
        if _end(len(_header(name, size)) + size) > limit:
            raise SystemExit(f"--part-mb: {name} has {size / 1e6:.1f} MB, more than a part of {limit / 1e6:g} MB takes")
    output.mkdir(parents=True, exist_ok=True)
    for old in (*output.glob("part-*.tar"), *output.glob(CONTENTS)):
        old.unlink()
    parts: list[Path] = []
    entries: list[dict[str, Any]] = []
    part = io.BytesIO()
    for name, path in files:
        data = path.read_bytes()
        member = _header(name, len(data)) + data + bytes(-len(data) % _BLOCK)
        if _end(part.tell() + len(member)) > limit:
            parts.append(_close(part, output, len(parts) + 1))
            part = io.BytesIO()
        part.write(member)
        entry = {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        entries.append({**entry, "part": f"part-{len(parts) + 1}.tar"})
    parts.append(_close(part, output, len(parts) + 1))
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    head = json.dumps(facts).removesuffix("}") + (", " if facts else "")
    (output / CONTENTS).write_text(f'{head}"files": [\n{lines}\n]}}\n')
    return parts


def find(paths: Sequence[Path]) -> list[Path]:
    """Find the parts in folders, or take them as they are named.

    Args:
        paths (Sequence[Path]): Folders and tar files.

    Returns:
        list[Path]: The tar files.

    Raises:
        SystemExit: If there is none.
    """
    parts = []
    for path in paths:
        found = sorted(path.glob("*.tar"), key=lambda p: (len(p.name), p.name)) if path.is_dir() else [path]
        if not found or not all(part.is_file() for part in found):
            raise SystemExit(f"no such part, and no folder with parts: {path}")
        parts += found
    return parts


def read(part: Path) -> Iterator[tuple[str, bytes]]:
    """Read the files of a part, and check them by the list that lies beside it.

    Args:
        part (Path): The tar file.

    Yields:
        tuple[str, bytes]: Name and content of each file.

    Raises:
        SystemExit: If the part or the list is damaged, or has a file with a name that no part has.
    """
    known: dict[str, dict[str, Any]] = {}
    try:
        if (part.parent / CONTENTS).is_file():
            known = {entry["name"]: entry for entry in json.loads((part.parent / CONTENTS).read_text())["files"]}
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"{part.parent / CONTENTS} is damaged: copy it again") from None
    wanted = {name for name, entry in known.items() if entry["part"] == part.name}
    try:
        with tarfile.open(part, "r:") as tar:
            for info in tar:
                names = info.name.split("/")
                if not info.isfile() or names[0] not in _FOLDERS or len(names) < 2 or not {"", ".."}.isdisjoint(names):
                    raise SystemExit(f"{part} is none of the parts: it holds {info.name}")
                file = tar.extractfile(info)
                data = file.read() if file else b""
                if known and hashlib.sha256(data).hexdigest() != known.get(info.name, {}).get("sha256"):
                    raise SystemExit(f"{part} is damaged at {info.name}: copy it again")
                wanted.discard(info.name)
                yield info.name, data
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SystemExit(f"{part} is damaged: {error}; copy it again") from None
    if wanted:
        raise SystemExit(f"{part} is damaged: {len(wanted)} of its files are missing; copy it again")


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def _end(size: int) -> int:
    """Compute the size of a tar file whose members have so many bytes, headers included."""
    return -(-(size + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _close(part: io.BytesIO, output: Path, number: int) -> Path:
    content = part.getvalue()
    path = output / f"part-{number}.tar"
    path.write_bytes(content + bytes(_end(len(content)) - len(content)))
    return path
