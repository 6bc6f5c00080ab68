# SPDX-License-Identifier: Apache-2.0
"""Run the notebook and keep its outputs.

usage: python notebooks/execute.py

What is kept is what a reader wants to see: printed text, tables and pictures. Progress bars and the log are left out,
and pictures become small ones.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import nbformat
import numpy as np
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
NOTEBOOK = HERE / "decad.ipynb"


def small(png: str) -> str:
    """Turn a picture into JPEG."""
    image = cv2.imdecode(np.frombuffer(base64.b64decode(png), np.uint8), cv2.IMREAD_COLOR)
    _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return base64.b64encode(encoded.tobytes()).decode()


def keep(output: Any) -> Any | None:
    """Keep what a reader wants to see of an output."""
    if output.output_type == "stream":
        # Nor what the exporter tells of its steps.
        lines = [line for line in output.text.splitlines(keepends=True) if not line.startswith("[torch.onnx]")]
        text = re.sub(r"^.*\r", "", "".join(lines), flags=re.MULTILINE).replace(f"{HERE}/", "")
        is_kept = output.name == "stdout" and text
        return nbformat.v4.new_output("stream", name="stdout", text=text) if is_kept else None
    if output.output_type == "error":
        return output
    data = output.data
    if "image/png" in data:
        return nbformat.v4.new_output("display_data", data={"image/jpeg": small(data["image/png"])})
    # Of what rich draws only tables, without their colors.
    text = re.sub(r"\x1b\[[0-9;]*m", "", data.get("text/plain", ""))
    is_table = any(line in text for line in "─━")
    return nbformat.v4.new_output("display_data", data={"text/plain": text}) if is_table else None


def joined(outputs: Iterable[Any]) -> list[Any]:
    """Join printed texts that follow each other."""
    result: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and result and result[-1].output_type == "stream":
            result[-1].text += output.text
        else:
            result.append(output)
    return result


def main() -> None:
    """Run the notebook in its own folder, and write it with its outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = joined(kept for output in cell.outputs if (kept := keep(output)) is not None)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
