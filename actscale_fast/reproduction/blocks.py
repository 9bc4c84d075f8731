"""What a report consists of, whatever it is written as: sections of text, tables, pictures and maps of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .intervals import Interval, in_form

Cell = str | int | float | Interval | None


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph, with `code` and **bold** as in Markdown."""

    text: str


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading and the form of its numbers."""

    label: str
    form: str = "{:.2f}"

    def shown(self, cell: Cell) -> str:
        """A cell as text."""
        if cell is None:
            return ""
        if isinstance(cell, Interval):
            return cell.shown(self.form)
        return cell if isinstance(cell, str) else in_form(cell, self.form)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under named columns; its name is that of its CSV file."""

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn picture, and the table of its data."""

    file: Path  # as PNG, for Markdown
    caption: str
    data: Table
    vector: Path  # the same as SVG, for HTML


@dataclass(frozen=True, slots=True)
class HeadMap:
    """A value for each layer and head (or position); Markdown shows its picture, HTML a map that tells each value."""

    name: str
    caption: str
    quantity: str
    layers: Sequence[int]
    rows: Sequence[str]  # the name of each head or position, such as "head 3"
    values: Sequence[Sequence[float]]  # [layers][rows]
    file: Path  # its picture
    form: str = "{:+.3f}"

    @property
    def data(self) -> Table:
        """One row per value."""
        rows: list[list[Cell]] = [
            [layer, row, value]
            for layer, of_layer in zip(self.layers, self.values, strict=True)
            for row, value in zip(self.rows, of_layer, strict=True)
        ]
        columns = [Column("layer", "{:d}"), Column("head or position", "{}"), Column(self.quantity, "{}")]
        return Table(self.name, columns, rows)


Block = Text | Table | Picture | HeadMap


@dataclass(slots=True)
class Section:
    """A heading with what stands under it."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    level: int = 2


@dataclass(slots=True)
class Document:
    """A whole report."""

    title: str
    sections: list[Section]

    @property
    def blocks(self) -> list[Block]:
        """The blocks of all sections."""
        return [block for section in self.sections for block in section.blocks]


def data_of(document: Document) -> list[Table]:
    """The tables of a report and of its pictures and maps."""
    return [
        block if isinstance(block, Table) else block.data for block in document.blocks if not isinstance(block, Text)
    ]
