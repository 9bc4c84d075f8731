"""Check the built site: links, anchors and pictures exist, nothing comes from elsewhere, and the search finds words.

The site generator checks the links that it finds in Markdown; this reads the HTML that a browser gets, so it also sees
the navigation, the API reference and the notebooks.

    python docs/tools/check_site.py
"""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

SITE = Path(__file__).resolve().parents[2] / "site"

#: A word that readers look for, and a page that the search must find for it.
SEARCHED = ("strength", "concepts.html")


class Page(HTMLParser):
    """The anchors of a page, what it links to, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") != "canonical" and "href" in values:
            self.loaded.append(values["href"])
        elif "src" in values:
            self.loaded.append(values["src"])


def faults(site: Path) -> list[str]:
    """One line for each fault of the site."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    pages.pop(site / "404.html", None)  # served at any address, so that its links are absolute
    found = [] if pages else [f"{site}: no pages"]
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            fault = _fault(link, path, pages, loaded=link in page.loaded)
            found += [f"{path.relative_to(site)}: {link}: {fault}"] if fault else []
    home = site / "index.html"
    links = pages[home].links if home in pages else []
    listed = {(site / link.partition("#")[0]).resolve() for link in links}
    copied = site / "files"  # what pages link to outside docs/, such as the report as one HTML file
    own = [path for path in pages if path not in {home, *listed} and copied not in path.parents]
    found += [f"{path.relative_to(site)}: not in the navigation" for path in own]
    items = json.loads((site / "search.json").read_text(encoding="utf-8"))["items"]
    word, place = SEARCHED
    if not any(item["location"].startswith(place) and word in item["title"] + item["text"] for item in items):
        found.append(f"search.json: {word!r} is not found on {place}")
    return found


def _fault(link: str, path: Path, pages: dict[Path, Page], *, loaded: bool) -> str | None:
    """What is wrong with a link, or None."""
    if re.match(r"[a-z][a-z+.-]*:|//", link):
        elsewhere = loaded and not link.startswith("data:")
        return "loaded from elsewhere, expected a file of the site" if elsewhere else None
    name, _, anchor = unquote(link).partition("#")
    target = (path.parent / name.partition("?")[0]).resolve() if name else path
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return "the file does not exist"
    if anchor and target in pages and anchor not in pages[target].anchors:
        return "the anchor does not exist"
    return None


def main() -> int:
    found = faults(SITE)
    n_pages = len(list(SITE.rglob("*.html")))
    print("\n".join([*found, f"{n_pages} pages, {len(found)} faults"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
