"""Results print as short tables, as text and as escaped HTML; misspelt names get a suggestion."""

from __future__ import annotations

import html.parser
import logging
from typing import Any

import pytest
import tiny
import torch

import actscale_fast as af
from actscale_fast._log import notice
from actscale_fast._suggestions import closest, did_you_mean
from actscale_fast._tables import html_table, ranges, text_table


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama()


@pytest.fixture(scope="module")
def examples() -> list[af.Example]:
    return [af.Example(f"The capital of {x} is", " Paris", " Rome") for x in ("A", "B", "C")]


@pytest.fixture
def scalars(model: Any) -> af.ActivScalar:
    made = af.ActivScalar.for_model(model)
    made[1, 2] = -1.5
    return made


class Checker(html.parser.HTMLParser):
    """Collects the texts of table cells, and checks that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.cells.append(data)


def check(shown: Any, *words: str, most: int = 25) -> None:
    """Both forms have the words; the text is short."""
    text = str(shown)
    assert len(text.splitlines()) <= most
    page = Checker()
    page.feed(shown._repr_html_())
    assert page.open == []
    for word in words:
        assert word in text, text
    columns, rows = shown.table()
    assert page.cells == [cell for row in ([columns] if rows else []) + rows for cell in row if cell]


def test_interventions_print_their_largest_scalars(model: Any, scalars: af.ActivScalar) -> None:
    check(scalars, "ActivScalar at head of llama, layers 0-2, every token", "-1.500", "1 of 12 parameters are active")
    assert repr(scalars) == "ActivScalar(site='head', layers=[0, 1, 2], positions=all, model='llama')"
    vector = af.SteerVec.for_model(model, "residual", [1], [0, -1])
    with torch.no_grad():
        vector.vectors[0, 1, 0, :9] = 2.0
    check(vector, "SteerVec at residual of llama, layer 1, positions 0, -1", "‖vectors‖", "-1", "6")
    check(af.DynScalar.for_model(model), "0 of 96 parameters")
    check(af.BoundlessDAS.for_model(model, layers=[1], positions=[-1]), "BoundlessDAS")
    check(scalars + vector, "Composite of 2", "1 of 12", "9 of 64")
    check(af.stack([scalars, scalars]), "(2 stacked)", "group")


def test_patches_say_whether_they_are_on(model: Any, scalars: af.ActivScalar) -> None:
    applied = af.patch(model, scalars, strength=-0.5)
    check(applied, "Patch on LlamaForCausalLM, strength -0.5", "-1.500")
    assert "on LlamaForCausalLM" in repr(applied)
    applied.paused = True
    assert "paused" in repr(applied)
    applied.remove()
    assert repr(applied).startswith("<Patch removed, strength -0.5")
    with af.patch(model, scalars + scalars, strength=torch.ones(2)) as several:
        check(several, "Patches on LlamaForCausalLM, strength one per row", "Composite of 2")


def test_results_print_as_tables(model: Any, scalars: af.ActivScalar, examples: list[af.Example]) -> None:
    tokenizer = tiny.tokenizer()
    evaluation = af.evaluate(model, tokenizer, examples, scalars)
    check(evaluation, "3 prompts", "before", "after", most=40)
    assert repr(evaluation) == str(evaluation)
    result = af.fit(model, tokenizer, examples, scalars, steps=2, progress=False)
    check(result, "Fit of 2 steps", "‖α‖₁", "ActivScalar(site='head'")
    check(af.FitResult(scalars, [], 0.0), "Fit of 0 steps")
    found = af.attribution(model, tokenizer, examples, progress=False)
    check(found, "Attribution", "predicted", "measured", "Pearson")
    assert len(found.table()[1]) == 10
    vectors = af.instruction_vectors(model, tokenizer, ["The capital of A is"], ["what is A"], progress=False)
    check(vectors, "Instruction vectors of llama, layers 0-2", "‖v‖")
    swept = af.sweep(model, tokenizer, examples, {"minimality": [0.0, 1.0]}, steps=1, progress=False)
    check(swept, "Sweep of 2 fits", "minimality=1", "Pareto front")


def test_attribution_names_positions_and_sites_without_heads(model: Any, examples: list[af.Example]) -> None:
    found = af.attribution(
        model, tiny.tokenizer(), examples, site="mlp_out", positions=[0, -1], knock_out=False, progress=False
    )
    columns, rows = found.table()
    assert columns == ["layer", "position", "predicted"]
    assert {row[1] for row in rows} == {"0", "-1"}


def test_cells_are_escaped_and_numbers_aligned() -> None:
    page = html_table(["<a>"], [["<script>alert(1)</script>"]], heading="&", notes=["<b>"])
    assert "<script" not in page
    assert "<b>&amp;</b>" in page
    assert "&lt;b&gt;" in page
    lines = text_table(["name", "n"], [["a", "1"], ["b", "+10.5"]]).splitlines()
    assert lines == ["name      n", "───────────", "a         1", "b     +10.5"]
    assert text_table(["name"], [], heading="none") == "none"
    assert ranges([0, 1, 2, 7, 5, 6]) == "0-2, 7, 5-6"


def test_a_misspelt_name_gets_a_suggestion(model: Any) -> None:
    assert closest("Mlp-Out", ["head", "mlp_out"]) == "mlp_out"
    assert did_you_mean("zebra", ["head", "mlp_out"]) == ""
    assert did_you_mean(3, ["head"]) == ""
    for lookup, meant in (
        (lambda: af.ActivScalr, "ActivScalar"),
        (lambda: af.tasks.country_capital_conflict, "country_capital_conflicts"),
        (lambda: af.plots.heatmp, "heatmap"),
        (lambda: af.ActivScalar.for_model(model, "heads"), "head"),
        (lambda: af.set_backend("refrence"), "reference"),
        (lambda: af.get_actscale_model(model, af.ActScaleConfig("SteerVector")), "SteerVec"),
        (lambda: af.fit(model, None, [], None, stepz=1), "steps"),
    ):
        with pytest.raises((AttributeError, ValueError, TypeError), match=rf"did you mean '{meant}'\?"):
            lookup()
    assert not hasattr(af, "__wrapped__")
    with pytest.raises(TypeError, match=r"did you mean positions=\[-1\]"):
        af.ActivScalar.for_model(model, positions="last")
    with pytest.raises(TypeError, match=r"a field of the objective: Objective\(minimality="):
        af.fit(model, None, [], None, minimality=0.1)


def test_notices_go_through_the_packages_logger(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "actscale_fast"):
        notice("downloading")
    assert [(record.name, record.message) for record in caplog.records] == [("actscale_fast", "downloading")]


def test_without_handlers_notices_go_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("actscale_fast")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [])
    notice("downloading")
    assert capsys.readouterr().err == "actscale-fast: downloading\n"
    logger.setLevel(logging.NOTSET)
