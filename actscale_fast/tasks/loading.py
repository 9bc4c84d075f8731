"""Examples from files, lists, data frames and data sets."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from .examples import FIELDS, Example
from .row_fields import by_column, by_place, check_columns, closest
from .row_files import Rows, file_rows

#: What examples are made from: the path of a file, or rows, such as examples, dicts, tuples or a table.
ExampleSource: TypeAlias = str | os.PathLike[str] | Iterable[Any]


def load_examples(path: ExampleSource, columns: Mapping[str, Hashable] | None = None) -> list[Example]:
    """Read examples from a file, or make them from rows in memory.

    A row has the columns "prompt" (or "messages", a chat), "correct", "wrong" and optionally "source", as the fields of
    `Example`; all other columns are ignored. `fit`, `evaluate`, `sweep` and `attribution` take the same sources.

    Args:
        path: the path of a file, which is read as CSV (.csv, .tsv), Parquet (.parquet, .pq) or otherwise as JSON (one
            object per line, or an array of objects); or rows: an iterable of dicts, of tuples (prompt, correct, wrong)
            or (prompt, correct, wrong, source), or of examples; or a pandas or polars DataFrame, a pyarrow Table or a
            `datasets.Dataset`.
        columns: other names of columns, by field: {"correct": "answer"} reads the correct answers from "answer".

    Returns:
        The examples. Their `where`, which error messages begin with, counts rows from 1: "row 3 of data.csv".

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: no rows, text that is not UTF-8 (with or without a byte order mark), a missing column, or
            a row that is not an example; the message names the row.
        ImportError: a Parquet file, and neither pyarrow nor pandas is installed.

    Example:
        >>> train = af.load_examples("train.csv", columns={"correct": "answer", "wrong": "distractor"})
        >>> train = af.load_examples([("The capital of Germany is", " Berlin", " Paris")])
    """
    return examples_from(path, columns=columns)


def examples_from(
    source: ExampleSource, name: str = "examples", columns: Mapping[str, Hashable] | None = None
) -> list[Example]:
    """As `load_examples`, with the name of the argument that holds rows in memory; every example has a `where`."""
    columns = _checked_columns(columns or {})
    table = _rows(source, name, [columns.get(field, field) for field in FIELDS])
    found = list(_examples(table, columns))
    if not found:
        raise ValueError(f"{table.name}: got none, expected at least one example")
    return found


def _checked_columns(columns: Mapping[str, Hashable]) -> Mapping[str, Hashable]:
    if not isinstance(columns, Mapping):
        raise TypeError(f'columns: got {type(columns).__name__}, expected a dict such as {{"correct": "answer"}}')
    for field in columns:
        if field not in FIELDS:
            close = closest(field, FIELDS)
            hint = "" if close is None else f"; did you mean {close!r}?"
            raise ValueError(f"columns: got the field {field!r}, expected one of {', '.join(FIELDS)}{hint}")
    return columns


def _rows(source: Any, name: str, wanted: list[Hashable]) -> Rows:
    """The rows of any source. Libraries are recognised by what their objects can do, and not imported."""
    if isinstance(source, str | os.PathLike):
        return file_rows(Path(source), wanted)
    if isinstance(source, Mapping):
        keys = ", ".join(map(repr, list(source)[:20]))
        raise TypeError(
            f"{name}: got {type(source).__name__} with the keys {keys}, expected rows, such as a list of dicts, or one "
            "split of a data set"
        )
    there: list[Hashable] | None = None
    if hasattr(source, "iloc") and hasattr(source, "columns"):  # pandas
        there = list(source.columns)
        if twice := [column for column in wanted if there.count(column) > 1]:
            raise ValueError(f"{name}: the column {twice[0]!r} occurs twice")
        source = source[[column for column in there if column in wanted]].to_dict("records")
    elif hasattr(source, "iter_rows") and hasattr(source, "columns"):  # polars
        there = list(source.columns)
        source = source.select([column for column in there if column in wanted]).iter_rows(named=True)
    elif hasattr(source, "to_pylist") and hasattr(source, "column_names"):  # pyarrow
        there = list(source.column_names)
        source = source.select([column for column in there if column in wanted]).to_pylist()
    elif hasattr(source, "with_format") and getattr(source, "column_names", None):  # datasets
        there = list(source.column_names)
        source = source.select_columns([column for column in there if column in wanted]).with_format(None)
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        raise TypeError(f"{name}: got {type(source).__name__}, expected examples: a path, or rows such as dicts")
    return Rows(name, ((row, None) for row in source), there, is_file=False)


def _examples(table: Rows, columns: Mapping[str, Hashable]) -> Iterator[Example]:
    if table.columns:
        check_columns(table.name, table.columns, columns, table.hint)
    for number, (row, line) in enumerate(table.rows, 1):
        where = f"row {number} of {table.name}" + ("" if line in (None, number) else f" (line {line})")
        yield _example(row, where, table, columns)


def _example(row: Any, where: str, table: Rows, columns: Mapping[str, Hashable]) -> Example:
    if isinstance(row, tuple) and hasattr(row, "_asdict"):
        row = row._asdict()
    if isinstance(row, Mapping) and not table.columns:
        check_columns(where, list(row), columns)
    try:
        if isinstance(row, Mapping):
            return Example(**by_column(row, columns), where=where)
        if columns and isinstance(row, Example | tuple | list):
            raise ValueError(f"a {type(row).__name__} has no column names, so columns= cannot be used")
        if isinstance(row, Example):
            return row if row.where else dataclasses.replace(row, where=where)
        if isinstance(row, tuple | list):
            return Example(**by_place(row), where=where)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    expected = "an object with the keys prompt, correct and wrong" if table.is_file else "an Example, a dict or a tuple"
    raise (ValueError if table.is_file else TypeError)(f"{where}: got {type(row).__name__}, expected {expected}")
