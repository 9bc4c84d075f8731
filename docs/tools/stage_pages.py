"""Collect the pages of the documentation site in build/docs, where the site generator finds them.

Pages link to each other as GitHub needs it: to files outside docs/ by relative paths, and to notebooks by their .ipynb
files. Here each page gets its place on the site, and each link is rewritten to it. Other files that pages link to, such
as pictures, are copied. A link that leads nowhere is an error.

    python docs/tools/stage_pages.py
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "build" / "docs"
STYLE = ROOT / "docs" / "tools" / "site.css"

#: Pages from outside docs/, with their names on the site.
OUTSIDE = {
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results/reproduction/report.md": "reproduction_report.md",
    "benchmarks/results/reproduction/smollm2-135m-instruct/report.md": "reproduction_smollm2.md",
    "benchmarks/results/reproduction/gemma-3-270m/report.md": "reproduction_gemma3.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "readme.md",
}

_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.M | re.S)
_LINK = re.compile(r"(\]\(|<img src=\")([^)\s\"]+)")
_FILE_NAME = re.compile(r"\[[\w/]+\.md(?=\]\(([^)#\s]+\.md))")


def staged_pages() -> dict[Path, Path]:
    """Each page or notebook of the repository, with its Markdown file on the site, relative to the site's root."""
    docs = ROOT / "docs"
    pages = {page: page.relative_to(docs) for page in sorted(docs.rglob("*.md"))}
    notebooks = {
        book: book.relative_to(docs).with_suffix(".md") for book in sorted((docs / "notebooks").glob("*.ipynb"))
    }
    return {**pages, **notebooks, **{ROOT / source: Path(name) for source, name in OUTSIDE.items()}}


def with_links(text: str, rewrite: Callable[[str], str]) -> str:
    """Markdown with each link outside fenced code replaced by `rewrite(link)`."""
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(lambda found: found[1] + rewrite(found[2]), text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(lambda found: found[1] + rewrite(found[2]), text[end:])])


class Stage:
    """Writes pages with rewritten links into a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.pages = staged_pages()
        self.broken: list[str] = []

    def write_all(self) -> None:
        shutil.rmtree(self.target, ignore_errors=True)
        for source, name in self.pages.items():
            text = source.read_text(encoding="utf-8") if source.suffix == ".md" else self.notebook(source, name)
            text = _FILE_NAME.sub(lambda found, s=source: f"[{self.title(s.parent / found[1])}", text)
            page = self.target / name
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(with_links(text, lambda link, s=source, n=name: self.link(link, s, n)), encoding="utf-8")
        shutil.copyfile(STYLE, self.target / STYLE.name)

    def title(self, page: Path) -> str:
        """The heading of a page, which takes the place of a file's name as a link's text."""
        heading = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.M) if page.is_file() else None
        return heading[1] if heading else page.name

    def link(self, link: str, source: Path, name: Path) -> str:
        """The link of the page `source` as it must be on the page `name` of the site."""
        path, _, anchor = link.partition("#")
        if not path or re.match(r"[a-z]+:", link) or (self.target / name.parent / path).is_file():
            return link
        found = (source.parent / path).resolve()
        if not found.is_file() or ROOT not in found.parents:
            self.broken.append(f"{source.relative_to(ROOT)}: {link}")
            return link
        place = self.pages.get(found)
        if place is None:
            place = Path("files") / found.relative_to(ROOT)
            (self.target / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, self.target / place)
        return Path(os.path.relpath(place, name.parent)).as_posix() + ("#" + anchor if anchor else "")

    def notebook(self, source: Path, name: Path) -> str:
        """A notebook with its outputs as Markdown; its pictures are written beside the page."""
        from nbconvert import MarkdownExporter

        text, resources = MarkdownExporter().from_filename(str(source), {"output_files_dir": f"{name.stem}_files"})
        folder = self.target / name.parent
        folder.mkdir(parents=True, exist_ok=True)
        for picture, data in resources["outputs"].items():
            (folder / picture).parent.mkdir(exist_ok=True)
            (folder / picture).write_bytes(data)
        shutil.copyfile(source, folder / source.name)
        title, rest = text.lstrip().split("\n", 1)
        return f"{title}\n\n[Download this notebook]({source.name}){{ .md-button download }}\n{rest}"


def main() -> int:
    stage = Stage(TARGET)
    stage.write_all()
    print("\n".join(f"broken link in {link}" for link in stage.broken), file=sys.stderr)
    return 1 if stage.broken else 0


if __name__ == "__main__":
    sys.exit(main())
