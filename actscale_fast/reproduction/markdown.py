"""Writes a report as Markdown."""

from __future__ import annotations

from pathlib import Path

from .blocks import Block, Column, Document, HeadMap, Table, Text


def as_markdown(document: Document, folder: Path) -> str:
    """The whole text; pictures are linked relative to the folder."""
    parts = [f"# {document.title}"]
    for section in document.sections:
        parts.append(f"{'#' * section.level} {section.title}")
        # Several maps may have one picture, which is shown once.
        parts += dict.fromkeys(_block(block, folder) for block in section.blocks)
    return "\n\n".join(parts) + "\n"


def _block(block: Block, folder: Path) -> str:
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Table):
        return table(block)
    alt = block.caption if not isinstance(block, HeadMap) else block.quantity
    return f"![{alt}]({block.file.relative_to(folder).as_posix()})"


def table(found: Table) -> str:
    """A table as Markdown."""
    rows = [[column.label for column in found.columns], ["---"] * len(found.columns)]
    rows += [[cell_text(column, cell) for column, cell in zip(found.columns, row, strict=True)] for row in found.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell_text(column: Column, cell: object) -> str:
    """A cell on one line, without the mark that separates cells."""
    return " ".join(column.shown(cell).replace("|", "∣").split())  # type: ignore[arg-type]
