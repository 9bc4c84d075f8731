"""The pages of the documentation and the Python examples in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def pages() -> list[Path]:
    """All pages that are written by hand."""
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        ROOT / "benchmarks" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(heading, Python) of each example of a page."""
    return [
        (section.splitlines()[0].strip(), code)
        for section in page.read_text(encoding="utf-8").split("\n## ")
        for code in re.findall(r"```python\n(.*?)```", section, re.S)
    ]
