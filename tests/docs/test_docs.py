"""The examples of the documentation run as they are written, on the real model; fits take two steps instead of many."""

from __future__ import annotations

import functools
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import actscale_fast as af
from actscale_fast.modules.hooks import record_of

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(name: str) -> list[tuple[str, str]]:
    """(heading, Python) of each example of a page."""
    return [
        (section.splitlines()[0], code)
        for section in (DOCS / name).read_text(encoding="utf-8").split("\n## ")[1:]
        for code in re.findall(r"```python\n(.*?)```", section, re.S)
    ]


SYSTEMS, INTEGRATIONS = blocks("systems.md"), blocks("integrations.md")


@pytest.fixture(scope="module")
def demo_model() -> tuple[Any, Any]:
    return af.load_demo_model()


def test_a_quick_start_of_every_system_has_twelve_lines_at_most() -> None:
    assert len({name for name, _ in SYSTEMS}) == 9
    assert {name: len(code.splitlines()) for name, code in SYSTEMS if len(code.splitlines()) > 12} == {}


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code"), SYSTEMS + INTEGRATIONS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(SYSTEMS + INTEGRATIONS)]
)
def test_the_example_runs(
    name: str, code: str, demo_model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for fit in ("fit", "fit_interchange"):
        monkeypatch.setattr(af, fit, functools.partial(getattr(af, fit), steps=2, batch_size=4, progress=False))
    fewer = re.sub(r"n_train=\d+, n_test=\d+", "n_train=16, n_test=8", code)
    model, tokenizer = demo_model
    (tmp_path / "example.py").write_text(fewer, encoding="utf-8")  # a file: nnsight reads the source of its blocks
    given = {"af": af, "model": model, "tokenizer": tokenizer, "torch": torch}
    runpy.run_path(str(tmp_path / "example.py"), init_globals=given)
    assert not any(record_of(module) for module in model.modules())  # the model is left as it was
