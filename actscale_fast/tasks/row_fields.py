"""The fields of an example in a row: by the names of columns, or by their places in a tuple."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from .examples import FIELDS

_SHOWN = 20  # names of columns in a message


def check_columns(name: str, there: Sequence[Hashable], columns: Mapping[str, Hashable], hint: str = "") -> None:
    """Raise a ValueError if a column is missing that every example needs, or that `columns` names.

    Args:
        name: what the message calls the table or row.
        there: the columns that it has.
        columns: other names of columns, by field.
        hint: ends the message if none of the columns is there.
    """
    names = {field: columns.get(field, field) for field in FIELDS}
    needed = {"correct", "wrong", *columns} | (set() if names["messages"] in there else {"prompt"})
    missing = next((field for field in FIELDS if field in needed and names[field] not in there), None)
    if missing is None:
        return
    wanted = names[missing]
    shown = ", ".join(map(repr, there[:_SHOWN])) + (", …" if len(there) > _SHOWN else "")
    close = closest(wanted, [column for column in there if column not in names.values()])
    if close is not None:
        advice = f"; did you mean {close!r}? columns={{{missing!r}: {close!r}}} (--columns {missing}={close}) reads it"
    elif hint and not set(there) & set(names.values()):
        advice = hint
    else:
        advice = f"; columns={{{missing!r}: 'NAME'}} (--columns {missing}=NAME) reads a column of another name"
    or_messages = " (or 'messages')" if wanted == "prompt" else ""
    raise ValueError(f"{name} has no column {wanted!r}{or_messages}; it has {shown or 'none'}{advice}")


def by_column(row: Mapping[Any, Any], columns: Mapping[str, Hashable]) -> dict[str, Any]:
    """The fields in a row with names of columns; other columns are ignored.

    A row with both a prompt and messages has the one that `columns` mentions.

    Raises:
        ValueError: a value is missing, or the row has both a prompt and messages.
    """
    given = {field: row.get(columns.get(field, field)) for field in FIELDS}
    found = {field: _plain(value) for field, value in given.items() if not _is_missing(value)}
    if "prompt" in found and "messages" in found:
        mentioned = [field for field in ("prompt", "messages") if field in columns]
        if len(mentioned) != 1:
            raise ValueError(
                "got both a prompt and messages; columns={'messages': 'messages'} (--columns messages=messages) "
                "chooses the messages"
            )
        del found["messages" if mentioned == ["prompt"] else "prompt"]
    for field in ("correct", "wrong", *(() if "messages" in found else ("prompt",))):
        if field not in found:
            raise ValueError(f"{field}: the value is missing")
    if isinstance(found.get("messages"), str):  # in a CSV file
        try:
            found["messages"] = json.loads(found["messages"])
        except (ValueError, RecursionError):
            raise ValueError("messages: got a string that is not JSON, expected a list of messages") from None
    return found


def by_place(row: Sequence[Any]) -> dict[str, Any]:
    """The fields in (prompt or messages, correct, wrong) or (prompt or messages, correct, wrong, source).

    Raises:
        ValueError: fewer or more values.
    """
    if len(row) not in (3, 4):
        raise ValueError(
            f"got {len(row)} values, expected (prompt, correct, wrong) or (prompt, correct, wrong, source)"
        )
    names = FIELDS if isinstance(row[0], str) else ("messages", *FIELDS[1:])
    return dict(zip(names, row, strict=False))


def closest(wanted: object, names: Iterable[Hashable]) -> Hashable | None:
    """The name that is most like the wanted one, whatever its case; None if none is."""
    by_text = {str(name).lower(): name for name in names}
    found = difflib.get_close_matches(str(wanted).lower(), by_text, n=1)
    return by_text[found[0]] if found else None


def _is_missing(value: Any) -> bool:
    """Whether a table has no value here: None, NaN, or the NA and NaT of pandas."""
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


def _plain(value: Any) -> Any:
    """A list for an array, as pandas reads lists from Parquet."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, str) else value
