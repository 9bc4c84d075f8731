"""Files of rows: JSON lines, JSON arrays, CSV and Parquet."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_JSON, _CSV, _PARQUET = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv"), (".parquet", ".pq")


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that are still to become examples."""

    name: str  # of the file, or of the argument
    rows: Iterable[tuple[Any, int | None]]  # each with its line in the file, if that has lines
    columns: Sequence[Hashable] | None = None  # of a table; None: each row has its own
    hint: str = ""  # ends the message about a missing column
    is_file: bool = True


def file_rows(path: Path, wanted: Collection[Hashable]) -> Rows:
    """The rows of a file, whose kind its name tells: .csv, .tsv, .parquet or .pq; anything else is JSON.

    Args:
        path: the file.
        wanted: the columns that are needed; a Parquet file's others are not read.

    Raises:
        FileNotFoundError, OSError: there is no such file, or it cannot be read.
        ValueError: not a file of this kind; the message names the file and the line.
        ImportError: a Parquet file, and no library that reads it.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file of examples")
    kind = path.suffix.lower()
    if kind in _PARQUET:
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}")
        return _parquet(path, wanted)
    text = _text(path)
    if kind in _CSV:
        return _csv(path, text, wanted, "\t" if kind == ".tsv" else None)
    return Rows(str(path), _json(path, text))


def _text(path: Path) -> str:
    """A file's text, with or without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8 text, or as Parquet"
        ) from None


def _json(path: Path, text: str) -> Iterator[tuple[Any, int | None]]:
    """The rows of a JSON array, or of one JSON value per line; blank lines are skipped."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and lines[0][1].lstrip().startswith("[") and not _is_json(lines[0][1]):  # an array over several lines
        lines = [(lines[0][0], text.lstrip())]
    array = _parsed(path, *lines[0]) if len(lines) == 1 else None
    if isinstance(array, list):
        yield from ((row, None) for row in array)
        return
    for number, line in lines:
        yield _parsed(path, number, line), number


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(path: Path, number: int, text: str) -> Any:
    """JSON that begins in this line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        kinds = ", ".join((*_CSV, *_PARQUET))
        expected = "expected one object per line, or an array of objects"
        if path.suffix.lower() not in _JSON:
            expected += f" (a file is read as JSON unless its name ends in {kinds})"
        line = number + error.lineno - 1
        raise ValueError(f"{path}, line {line}: not JSON ({error.msg}, column {error.colno}); {expected}") from None
    except RecursionError:
        raise ValueError(f"{path}, line {number}: JSON that is nested too deeply") from None


def _csv(path: Path, text: str, wanted: Collection[Hashable], delimiter: str | None) -> Rows:
    """The rows of a table with a header; columns are separated by commas, semicolons or tabs."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = delimiter or max(",;\t", key=first.count)  # with none of them, the comma
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    cells = _cells(path, lines)
    _, header = next(cells, (0, []))
    columns = [column.strip() for column in header]
    twice = next((column for column in columns if column in wanted and columns.count(column) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: the column {twice!r} occurs twice in the header")

    def rows() -> Iterator[tuple[Any, int | None]]:
        for line, row in cells:
            if len(row) != len(columns):
                raise ValueError(
                    f"{path}, line {line}: got {len(row)} cells, expected {len(columns)} as in the header; a text that "
                    f"contains {delimiter!r} must be put in double quotes"
                )
            yield {column: cell or None for column, cell in zip(columns, row, strict=True)}, line

    hint = "; a CSV file begins with a line of column names, such as prompt,correct,wrong"
    return Rows(str(path), rows(), columns, hint)


def _cells(path: Path, lines: Any) -> Iterator[tuple[int, list[str]]]:
    """Each row of a CSV file that is not empty, with the line where it begins."""
    while True:
        begin = lines.line_num + 1
        try:
            row = next(lines, None)
        except csv.Error as error:
            raise ValueError(f"{path}, line {begin}: not CSV ({error})") from None
        if row is None:
            return
        if any(row):
            yield begin, row


def _parquet(path: Path, wanted: Collection[Hashable]) -> Rows:
    """The rows of a Parquet file, read by pyarrow, or by pandas with another engine."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        parquet = None
    try:
        if parquet is None:
            frame = importlib.import_module("pandas").read_parquet(path)
            columns, rows = list(frame.columns), frame[[c for c in frame.columns if c in wanted]].to_dict("records")
        else:
            with parquet.ParquetFile(path) as file:
                columns = list(file.schema_arrow.names)
                rows = file.read(columns=[column for column in columns if column in wanted]).to_pylist()
    except ImportError:
        raise ImportError(f"{path}: reading Parquet files needs pyarrow (pip install pyarrow)") from None
    except (ValueError, OSError) as error:  # pyarrow's errors are one of these
        raise ValueError(f"{path}: cannot be read as Parquet ({' '.join(str(error).split())[:200]})") from None
    return Rows(str(path), ((row, None) for row in rows), columns)
