"""Writes the data of every table and picture of a report as CSV files."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from .._files import atomic_path
from .blocks import Document, Table, data_of
from .intervals import Interval


def write_csv_files(document: Document, folder: Path) -> list[Path]:
    """One file per table, picture and map; figures with an interval take three columns."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for found in data_of(document):
        path = folder / f"{found.name}.csv"
        with atomic_path(path) as temporary:
            temporary.write_text(as_csv(found), encoding="utf-8")
        written.append(path)
    return written


def as_csv(found: Table) -> str:
    """A table as CSV; a column with intervals is followed by those of their ends."""
    wide = [any(isinstance(row[number], Interval) for row in found.rows) for number in range(len(found.columns))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head: list[str] = []
    for column, is_wide in zip(found.columns, wide, strict=True):
        head += [column.label, f"{column.label}, 2.5 %", f"{column.label}, 97.5 %"] if is_wide else [column.label]
    writer.writerow(head)
    for row in found.rows:
        cells: list[object] = []
        for cell, is_wide in zip(row, wide, strict=True):
            if isinstance(cell, Interval):
                cells += [_short(cell.value), _short(cell.low), _short(cell.high)]
            else:
                cells += [_short(cell), "", ""] if is_wide else [_short(cell)]
        writer.writerow(cells)
    return out.getvalue()


def _short(cell: object) -> object:
    return f"{cell:.6g}" if isinstance(cell, float) else "" if cell is None else cell
