"""The API reference has every public name, and the check of the built site finds what is broken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from check_site import faults
from doc_pages import ROOT
from stage_pages import Stage, with_links

import actscale_fast as af

REFERENCE = {
    name for page in (ROOT / "docs" / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
}


def test_the_api_reference_has_every_public_name() -> None:
    names = {f"actscale_fast.{name}" for name in af.__all__}
    for module in ("ops", "plots", "tasks"):
        own = set(getattr(af, module).__all__) - set(af.__all__)
        names |= {f"actscale_fast.{module}.{name}" for name in own if not name.isupper()}
    assert names - REFERENCE == set()


def test_the_api_reference_has_every_integration() -> None:
    files = (ROOT / "actscale_fast" / "integrations").glob("[a-z]*.py")
    assert {f"actscale_fast.integrations.{file.stem}" for file in files} - REFERENCE == set()


def test_no_link_of_the_pages_is_broken_on_the_site(tmp_path: Path) -> None:
    pytest.importorskip("nbconvert")
    stage = Stage(tmp_path)
    stage.write_all()
    assert stage.broken == []
    assert "](benchmarks.md)" in (tmp_path / "index.md").read_text()  # docs/index.md has ../benchmarks/README.md
    assert list((tmp_path / "notebooks").rglob("*.png"))


def test_links_in_code_are_left_alone() -> None:
    text = "[a](b.md)\n```\n[a](b.md)\n```\n[a](b.md)"
    assert with_links(text, str.upper) == "[a](B.MD)\n```\n[a](b.md)\n```\n[a](B.MD)"


def site(folder: Path, body: str) -> Path:
    """A site of two pages, of which the first has `body`."""
    links = '<a href="concepts.html">'
    (folder / "index.html").write_text(links + body)
    (folder / "concepts.html").write_text('<h2 id="glossary">')
    found = '{"location": "concepts.html#glossary", "title": "strength", "text": ""}'
    (folder / "search.json").write_text(f'{{"items": [{found}]}}')
    return folder


@pytest.mark.parametrize(
    "body", ["", '<a href="concepts.html#glossary">', '<a href="https://arxiv.org">', '<img src="data:">']
)
def test_a_sound_site_has_no_faults(tmp_path: Path, body: str) -> None:
    assert faults(site(tmp_path, body)) == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<a href="nowhere.html">', "the file does not exist"),
        ('<a href="concepts.html#nothing">', "the anchor does not exist"),
        ('<img src="nothing.png">', "the file does not exist"),
        ('<script src="https://cdn.example/x.js">', "loaded from elsewhere"),
        ('<link rel="stylesheet" href="//fonts.example/x.css">', "loaded from elsewhere"),
    ],
)
def test_faults_of_a_site_are_found(tmp_path: Path, body: str, fault: str) -> None:
    (found,) = faults(site(tmp_path, body))
    assert fault in found


def test_a_page_outside_the_navigation_and_an_empty_search_are_found(tmp_path: Path) -> None:
    site(tmp_path, "")
    (tmp_path / "lost.html").write_text("")
    (tmp_path / "search.json").write_text('{"items": []}')
    assert len(faults(tmp_path)) == 2
