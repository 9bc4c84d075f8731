"""Rows of text as a table: plain text for a terminal, HTML for a notebook."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_NUMBER = re.compile(r"[-+−]?(\d[\d,.]*)?([eE][-+]?\d+)?( ?%)?|nan|inf|–")

Columns = Sequence[str]
Rows = Sequence[Sequence[str]]


class Readable:
    """A result that prints as a short table, and as an HTML table in a notebook.

    Subclasses have `table()` and may have `_heading()` and `_notes()`. A dataclass needs `repr=False`.
    """

    __slots__ = ()

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text."""
        raise NotImplementedError

    def _heading(self) -> str:
        """The line above the table."""
        return type(self).__name__

    def _notes(self) -> list[str]:
        """The lines below the table."""
        return []

    def __str__(self) -> str:
        return text_table(*self.table(), heading=self._heading(), notes=self._notes())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html_table(*self.table(), heading=self._heading(), notes=self._notes())


def text_table(columns: Columns, rows: Rows, *, heading: str = "", notes: Sequence[str] = ()) -> str:
    """The table as lines of text; columns of numbers are aligned to the right.

    Args:
        columns: the names of the columns.
        rows: one text per column each.
        heading: the line above; "": none.
        notes: the lines below.
    """
    right = _numeric(len(columns), rows)
    lines = [heading] if heading else []
    if rows:
        widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
        for row in (columns, *rows):
            cells = [
                cell.rjust(width) if number else cell.ljust(width)
                for cell, width, number in zip(row, widths, right, strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
        lines.insert(len(lines) - len(rows), "─" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join([*lines, *notes])


def html_table(columns: Columns, rows: Rows, *, heading: str = "", notes: Sequence[str] = ()) -> str:
    """The table as HTML, every text escaped; arguments as in `text_table`."""
    right = _numeric(len(columns), rows)
    styles = [f' style="text-align: {"right" if number else "left"}"' for number in right]

    def line(cells: Sequence[str], tag: str) -> str:
        made = (f"<{tag}{style}>{html.escape(cell)}</{tag}>" for cell, style in zip(cells, styles, strict=True))
        return f"<tr>{''.join(made)}</tr>"

    parts = [f"<p><b>{html.escape(heading)}</b></p>"] if heading else []
    if rows:
        body = "".join(line(row, "td") for row in rows)
        parts.append(f"<table><thead>{line(columns, 'th')}</thead><tbody>{body}</tbody></table>")
    parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    return f"<div>{''.join(parts)}</div>"


def ranges(numbers: Sequence[int]) -> str:
    """ "0-3, 7" for 0, 1, 2, 3 and 7, in the order given."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _numeric(n_columns: int, rows: Rows) -> list[bool]:
    """Which columns have nothing but numbers; a column without any text has none."""
    columns = [[row[index] for row in rows if row[index]] for index in range(n_columns)]
    return [bool(cells) and all(_NUMBER.fullmatch(cell) for cell in cells) for cells in columns]
