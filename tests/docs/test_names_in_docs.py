"""What README and documentation name exists: files, links, modules and public functions."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import ROOT, pages

#: Folders whose files are named from the root of the repository.
_FOLDERS = ("actscale_fast", "benchmarks", "csrc", "docs", "tests")
_PATH = re.compile(rf"(?:{'|'.join(_FOLDERS)})/[\w./*-]*\w/?|[\w.-]+\.(?:cff|md|toml|txt|yaml)")
#: Names of files that are an example's own, and words that only look like a path.
_OWN = {"config.toml", "report.md", "weddings.txt", "ordinary.txt"}


def spans(text: str) -> Iterator[str]:
    """What stands between backticks, blocks of code included."""
    for block in re.findall(r"```\w*\n(.*?)```", text, re.S):
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "#footnote")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page: Path) -> None:
    named = {path for span in spans(page.read_text(encoding="utf-8")) for path in _PATH.findall(span)} - _OWN
    assert [path for path in sorted(named) if not (any(ROOT.glob(path)) or (page.parent / path).exists())] == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_and_public_names_exist(page: Path) -> None:
    missing = []
    for span in spans(page.read_text(encoding="utf-8")):
        for found in re.finditer(r"(?<![\w./-])(actscale_fast|af|integrations|ops)\.([A-Za-z_][\w.]*)", span):
            prefix, rest = found.groups()
            inside = prefix if prefix in ("integrations", "ops") else ""
            if not exists(".".join(filter(None, ["actscale_fast", inside, rest.rstrip(".")]))):
                missing.append(found[0])
    assert missing == []


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("actscale_fast"):
                return True  # it needs a library that is not installed here
            continue
        except ImportError:
            return True
        for name in parts[end:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@pytest.mark.parametrize("name", ["actscale_fast.models", "actscale_fast.fitt", "actscale_fast.ops.scale_head"])
def test_a_name_that_does_not_exist_is_found(name: str) -> None:
    assert not exists(name)
