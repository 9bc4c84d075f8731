"""Writes a report as one HTML file that needs no network: contents, sortable tables, maps that tell their values."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator
from pathlib import Path

from .blocks import Block, Column, Document, HeadMap, Picture, Table, Text
from .html_parts import SCRIPT, STYLE
from .intervals import Interval, in_form

#: Side of a cell of a map, in pixels.
_CELL = 16


def as_html(document: Document) -> str:
    """The whole page."""
    anchors = _anchors(document)
    contents = "".join(
        f'<li class="l{section.level}"><a href="#{anchor}">{_inline(section.title)}</a></li>'
        for section, anchor in zip(document.sections, anchors, strict=True)
    )
    body = "".join(
        f'<h{section.level} id="{anchor}">{_inline(section.title)}</h{section.level}>'
        + "".join(map(_block, section.blocks))
        for section, anchor in zip(document.sections, anchors, strict=True)
    )
    title = html.escape(document.title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{title}</title><style>{STYLE}</style></head><body>'
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav><main><h1>{title}</h1>{body}</main>'
        f'<div id="tip" role="tooltip" hidden></div><script>{SCRIPT}</script></body></html>\n'
    )


def _anchors(document: Document) -> list[str]:
    """A different anchor for every section."""
    found: list[str] = []
    for section in document.sections:
        base = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "section"
        anchor, number = base, 2
        while anchor in found:
            anchor, number = f"{base}-{number}", number + 1
        found.append(anchor)
    return found


def _inline(text: str) -> str:
    """Text with `code`, **bold** and [links](…), escaped."""
    escaped = html.escape(text, quote=False)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    escaped = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped)
    linked = re.sub(r"\[([^\]]+)\]\(([A-Za-z0-9_./#-]+)\)", r'<a href="\2">\1</a>', escaped)
    return linked.replace('/report.md">', '/report.html">')  # of a page to a page, as of a text to a text


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, HeadMap):
        return _map(block)
    return _picture(block)


def _table(found: Table) -> str:
    head = "".join(f'<th><button type="button">{_inline(column.label)}</button></th>' for column in found.columns)
    rows = "".join(
        "<tr>" + "".join(_cell(column, cell) for column, cell in zip(found.columns, row, strict=True)) + "</tr>"
        for row in found.rows
    )
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="file">Data: <code>csv/{found.name}.csv</code></p>'
    )


def _cell(column: Column, cell: object) -> str:
    shown = _inline(column.shown(cell))  # type: ignore[arg-type]
    if isinstance(cell, Interval):
        shown = re.sub(r"(\[.*\])", r"<small>\1</small>", shown)
        return f'<td class="n" data-v="{cell.value:.6g}">{shown}</td>'
    if isinstance(cell, int | float):
        return f'<td class="n" data-v="{cell:.6g}">{shown}</td>'
    return f"<td>{shown}</td>"


def _picture(block: Picture) -> str:
    """The picture inside the page."""
    data = base64.b64encode(block.vector.read_bytes()).decode()
    caption = _inline(block.caption)
    return (
        f'<figure><img alt="{html.escape(block.caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{caption} Data: <code>csv/{block.data.name}.csv</code></figcaption></figure>"
    )


def _map(block: HeadMap) -> str:
    """Layers from left to right; a blank cell is exactly 0."""
    left, top = 8 + 6 * max((len(row) for row in block.rows), default=0), 18
    width, height = left + _CELL * len(block.layers) + 4, top + _CELL * len(block.rows) + 4
    svg = "".join(_squares(block, left, top))
    every = max(len(block.layers) // 12, 1)
    labels = "".join(
        f'<text x="{left + _CELL * (place + 0.5):g}" y="12" text-anchor="middle">{layer}</text>'
        for place, layer in enumerate(block.layers)
        if place % every == 0
    )
    labels += "".join(
        f'<text x="{left - 4}" y="{top + _CELL * (place + 0.7):g}" text-anchor="end">{html.escape(row)}</text>'
        for place, row in enumerate(block.rows)
    )
    return (
        f'<figure><svg class="map" role="img" aria-label="{html.escape(block.caption)}" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}">{labels}{svg}</svg>'
        f"<figcaption>{_inline(block.caption)} Point at a cell for its value; layers from left to right. "
        f"Data: <code>csv/{block.name}.csv</code></figcaption></figure>"
    )


def _squares(block: HeadMap, left: int, top: int) -> Iterator[str]:
    limit = max((abs(value) for row in block.values for value in row), default=0.0) or 1.0
    for column, (layer, of_layer) in enumerate(zip(block.layers, block.values, strict=True)):
        for place, (row, value) in enumerate(zip(block.rows, of_layer, strict=True)):
            tip = html.escape(f"layer {layer}, {row}: {block.quantity} {in_form(value, block.form)}")
            yield (
                f'<rect x="{left + _CELL * column + 1}" y="{top + _CELL * place + 1}" width="{_CELL - 2}" '
                f'height="{_CELL - 2}" rx="2" fill="{_colour(value / limit)}" data-t="{tip}"/>'
            )


#: Blue, near white and red of the pictures' scale, and the colour of a 0.
_BLUE, _WHITE, _RED, _BLANK = (33, 102, 172), (247, 247, 247), (178, 24, 43), "#eceef1"


def _colour(share: float) -> str:
    """The colour of a value between −1 and 1."""
    if share == 0:
        return _BLANK
    end = _RED if share > 0 else _BLUE
    weight = 0.15 + 0.85 * min(abs(share), 1.0)  # a small value is still seen
    mixed = (round(w + (e - w) * weight) for w, e in zip(_WHITE, end, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def embedded_svg(figure: object, file: Path) -> None:
    """Save a matplotlib figure as a small SVG: words stay text, and the same figure gives the same bytes."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": file.stem}):
        figure.savefig(out, format="svg", metadata={"Date": None})  # type: ignore[attr-defined]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_shortened(out.getvalue()), encoding="utf-8")


#: What holds coordinates in points: paths, lists of points, and shifts. Words and factors keep their digits.
_COORDINATES = re.compile(r"""(?<=\s)(?:d|points)="[^"]*"|translate\([^)"]*\)""")


def _shortened(svg: str) -> str:
    """Coordinates with two decimals of a point, which are enough."""
    return _COORDINATES.sub(lambda found: re.sub(r"(\d+\.\d{2})\d+(?!\d*[eE])", r"\1", found[0]), svg)
