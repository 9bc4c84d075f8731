"""Run the notebooks of docs/notebooks and keep their outputs, so that readers see the results without running anything.

    python docs/tools/run_notebooks.py            # all of them
    python docs/tools/run_notebooks.py first_fit  # one

Timestamps, machine names and versions are left out, so that a run that changes nothing leaves the files alone.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


def run(path: Path) -> Any:
    """The notebook with fresh outputs, run in an empty folder; raises CellExecutionError if a cell fails."""
    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return stripped(book)


def stripped(book: Any) -> Any:
    """The notebook without what differs from run to run or from machine to machine."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for number, cell in enumerate(book.cells):
        cell.metadata = {}
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            # Progress and warnings of libraries are no results.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return book


def main(names: list[str]) -> int:
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        begun = time.perf_counter()
        nbformat.write(run(path), path)
        print(f"{path.name}: {time.perf_counter() - begun:.0f} s, {path.stat().st_size >> 10} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
