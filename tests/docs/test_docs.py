"""The examples of README and documentation run as they are written, on the real model, with short fits and texts."""

from __future__ import annotations

import functools
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_pages import ROOT, blocks, pages

import actscale_fast as af
from actscale_fast import defaults
from actscale_fast._checks import share_of
from actscale_fast.modules.hooks import record_of
from benchmarks import by_the_defaults, head_methods, heads_judged, stress_tests

EXAMPLES = [(page.relative_to(ROOT), heading, code) for page in pages() for heading, code in blocks(page)]


def test_a_quick_start_of_every_system_has_twelve_lines_at_most() -> None:
    systems = blocks(ROOT / "docs" / "systems.md")[1:]
    assert len({name for name, _ in systems}) == 10
    assert {name: len(code.splitlines()) for name, code in systems if len(code.splitlines()) > 12} == {}


def test_readme_is_short_and_its_first_example_has_about_ten_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    _, code = blocks(ROOT / "README.md")[0]
    assert len([line for line in code.splitlines() if line]) <= 12


@pytest.mark.parametrize("page", ["README.md", "docs/quick_start.md"])
def test_the_first_example_is_the_demo_and_the_table_has_its_figures(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    report = json.loads((ROOT / "benchmarks/results/demo/demo.json").read_text(encoding="utf-8"))
    demo, found = report["settings"], report["held_out"]
    templates = f"af.tasks.CONFLICT_TEMPLATES[:{demo['n_templates']}]"
    assert f"tokenizer, n_train={demo['n_train']}, n_test={demo['n_test']}, templates={templates}\n" in text
    assert (demo["steps"], demo["lr"], demo["batch_size"]) == (
        defaults.STEPS,
        share_of(defaults.LR),
        defaults.BATCH_SIZE,
    )
    objective = (demo["margin"], demo["faithfulness"], demo["minimality"])
    assert objective == (defaults.MARGIN, defaults.FAITHFULNESS, defaults.MINIMALITY)
    for figure in (found["flip_to_correct"], found["flip_to_wrong"], found["baseline"]["flip_to_correct"]):
        assert f"{figure:.2f}" in text
    assert f"**{found['kl']:.3f}**" in text
    assert f"**{found['n_active']}**" in text


def test_the_table_of_fits_with_the_defaults_is_that_of_their_files() -> None:
    folder = ROOT / "benchmarks/results/defaults"
    assert by_the_defaults.table(folder) in (ROOT / "docs/evidence.md").read_text(encoding="utf-8")


def test_the_table_of_methods_that_choose_heads_is_that_of_its_file() -> None:
    folder = ROOT / "benchmarks/results/heads"
    text = (ROOT / "docs/heads.md").read_text(encoding="utf-8")
    assert head_methods.table(folder) in text
    assert head_methods.mib_table(folder) in text


@pytest.mark.parametrize("name", ["faithfulness", "conflicts"])
def test_the_tables_of_judged_heads_are_those_of_their_files(name: str) -> None:
    path = ROOT / f"benchmarks/results/heads/{name}.json"
    assert heads_judged.table(path) in (ROOT / "docs/heads.md").read_text(encoding="utf-8")


def test_the_table_of_stress_tests_is_that_of_their_files() -> None:
    folder = ROOT / "benchmarks/results/stress"
    text = (ROOT / "docs/stress.md").read_text(encoding="utf-8")
    for table in stress_tests.table(folder).split("\n\n"):
        assert table in text


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "heading", "code"),
    EXAMPLES,
    ids=[f"{page.stem}-{i}-{heading}" for i, (page, heading, _) in enumerate(EXAMPLES)],
)
def test_the_example_runs(
    page: Path, heading: str, code: str, demo_model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for fit in ("fit", "fit_interchange"):
        monkeypatch.setattr(af, fit, functools.partial(getattr(af, fit), steps=1, batch_size=2, progress=False))
    few = f"n_train={2 if page.stem == 'sweeps' else 4}, n_test=2"  # each fit of a sweep takes them all
    fewer = re.sub(r"n_train=\d+, n_test=\d+", few, code)
    fewer = fewer.replace("country_capital_conflicts(tokenizer)", f"country_capital_conflicts(tokenizer, {few})")
    fewer = re.sub(r"max_new_tokens=\d+", "max_new_tokens=4", fewer)
    model, tokenizer = demo_model
    monkeypatch.setattr(af, "load_demo_model", lambda: demo_model)
    if page.name != "README.md":  # a fit checks the model's gradients first: once is enough for one model
        monkeypatch.setenv("ACTSCALE_CHECK", "0")
    (tmp_path / "example.py").write_text(fewer, encoding="utf-8")  # a file: nnsight reads the source of its blocks
    given = {"af": af, "model": model, "tokenizer": tokenizer, "torch": torch}
    runpy.run_path(str(tmp_path / "example.py"), init_globals=given)
    assert not any(record_of(module) for module in model.modules())  # the model is left as it was
