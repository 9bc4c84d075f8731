"""Claims are decided by intervals, which resample seeds and prompts."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from actscale_fast.reproduction.blocks import Column, Document, HeadMap, Section, Table, Text
from actscale_fast.reproduction.claims import judged
from actscale_fast.reproduction.csv_files import as_csv
from actscale_fast.reproduction.html import _shortened, as_html, embedded_svg
from actscale_fast.reproduction.intervals import Interval, all_of, interval, mean
from actscale_fast.reproduction.markdown import table
from actscale_fast.reproduction.tuning import chosen


def record(correct: float, wrong: float, kl: float = 0.1, n_active: int = 10, *, n: int = 400) -> dict[str, Any]:
    """The record of n prompts with these shares."""
    ones = [[1] * round(share * n) + [0] * (n - round(share * n)) for share in (correct, wrong)]
    return {
        "correct": ones[0], "wrong": ones[1], "kl": [kl] * n, "n_active": n_active, "n_places": 10, "n_parameters": 100,
        "frozen": {"correct": [0] * n, "wrong": [1] * n},
    }  # fmt: skip


def results(**changes: Any) -> dict[str, Any]:
    scalars, vectors = [record(0.96, 1.0), record(1.0, 0.96)], [record(0.97, 1.0, n_active=1000)] * 2
    lengths = {
        str(number): {"probes": {"lengths": [9 + number, 9 + number], "runs": [record(0.99, 1.0)]}} for number in (0, 2)
    }
    found = {"scalars": scalars, "vectors": vectors, "few": [record(0.97, 0.95)], "lengths": lengths} | changes
    names = {"few-scalars": found["few"]}
    for form in ("", "-by-position"):
        names |= {f"{name}{form}": found[name] for name in ("scalars", "vectors")}
    systems = {name: [{"test": one} for one in runs] for name, runs in names.items()}
    return {"comparison": {"t": systems}, "transfer": {"t": {"lengths": found["lengths"]}}}


def verdicts(**changes: Any) -> list[str]:
    """Effective and faithful, minimal (per position and per head), few, transferred."""
    return [claim.verdict for claim in judged(results(**changes), ["t"])]


def test_claims_are_held_where_whole_intervals_meet_the_criteria() -> None:
    assert verdicts() == ["held"] * 6
    found = judged(results(), ["t"])
    assert "10 of 100 heads" in found[4].found
    assert "flips 0.98" in found[0].found


@pytest.mark.parametrize(
    ("changes", "which"),
    [
        ({"vectors": [record(0.97, 1.0, kl=0.05, n_active=1000)] * 2}, (0, 2)),  # twice the KL
        ({"vectors": [record(0.97, 1.0, n_active=99)] * 2}, (1, 3)),
        ({"few": [record(0.7, 1.0)]}, (4,)),
        ({"scalars": [record(0.7, 0.8)] * 2}, (0, 1, 2, 3)),
    ],
)
def test_a_claim_whose_criterion_is_missed_is_not_held(changes: Any, which: tuple[int, ...]) -> None:
    assert verdicts(**changes) == ["not held" if number in which else "held" for number in range(6)]


def test_a_bound_within_the_interval_decides_nothing() -> None:
    assert verdicts(few=[record(0.85, 1.0, n=20)])[4] == "not decided"
    assert verdicts(few=[record(0.9, 1.0, n=20)])[4] == "not decided"


def test_what_has_no_effect_is_neither_effective_nor_minimal() -> None:
    at_rest = [record(0.0, 1.0, kl=0.0, n_active=0)] * 2
    assert verdicts(scalars=at_rest, vectors=at_rest)[:2] == ["not held", "not held"]


def test_one_length_tests_no_transfer() -> None:
    lengths = results()["transfer"]["t"]["lengths"]
    lengths["2"]["probes"]["runs"] = []
    assert verdicts(lengths=lengths)[5] == "not tested"
    lengths["2"]["probes"]["runs"] = [record(0.5, 1.0)]
    assert verdicts(lengths=lengths)[5] == "not held"


def test_an_interval_covers_prompts_and_seeds() -> None:
    prompts = mean([[0, 1] * 50])
    assert prompts.value == 0.5
    assert (prompts.low, prompts.high) == pytest.approx((0.40, 0.60), abs=0.02)  # 1.96 · 0.5 / √100
    seeds = mean([[0.0] * 100, [1.0] * 100])
    assert (seeds.low, seeds.high) == (0.0, 1.0)  # prompts of a seed agree, seeds do not
    same = mean([[1.0] * 10] * 3)
    assert (same.low, same.high) == (1.0, 1.0)
    assert mean([[0, 1] * 50]) == prompts


def test_differences_on_the_same_prompts_are_paired() -> None:
    values = np.arange(40) % 2
    runs: list[Any] = [{"a": values, "b": values - 0.25}]
    assert interval(runs, lambda x: x["a"] - x["b"]).shown() == "0.25"


def test_one_part_that_is_not_held_decides() -> None:
    assert all_of(["held", "not decided", "not held"]) == "not held"
    assert all_of(["held", "not decided"]) == "not decided"
    assert all_of(["held", "held"]) == "held"


def test_settings_are_the_most_faithful_of_those_that_flip_nearly_most() -> None:
    points = [
        {"settings": {"lr": "a"}, "flips": 0.9, "kl": 0.5},
        {"settings": {"lr": "b"}, "flips": 0.89, "kl": 0.2},
        {"settings": {"lr": "c"}, "flips": 0.8, "kl": 0.1},
    ]
    assert chosen(points) == {"lr": "b"}


def test_one_table_is_written_as_markdown_csv_and_html() -> None:
    found = Table("t", [Column("a | b"), Column("x")], [["<one> | `two`", Interval(0.5, 0.25, 1.0)], ["three", None]])
    lines = table(found).splitlines()
    assert lines[2] == "| <one> ∣ `two` | 0.50 [0.25, 1.00] |"
    assert as_csv(found).splitlines()[1] == "<one> | `two`,0.5,0.25,1"
    page = as_html(Document("A & B", [Section("S", [Text("**bold** & `code`"), found]), Section("S", [])]))
    assert "&lt;one&gt; | <code>two</code>" in page
    assert '<td class="n" data-v="0.5">0.50 <small>[0.25, 1.00]</small></td>' in page
    assert "<title>A &amp; B</title>" in page
    assert ['id="s"' in page, 'id="s-2"' in page] == [True, True]
    assert "<strong>bold</strong> &amp; <code>code</code>" in page


def test_a_map_tells_layer_head_and_value(tmp_path: Any) -> None:
    found = HeadMap("m", "a map", "α", [3, 7], ["head 0", "head 1"], [[0.0, -0.5], [0.25, 0.0]], tmp_path / "m.png")
    page = as_html(Document("D", [Section("S", [found])]))
    assert 'data-t="layer 3, head 1: α −0.500"' in page
    assert page.count("<rect") == 4
    assert as_csv(found.data).splitlines()[2] == "3,head 1,-0.5"


def test_a_vector_picture_keeps_the_digits_of_its_words(tmp_path: Any) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot([0.0, 1.0, 2.0], [0.0, 0.0025, 0.00125])
    axes.set_yticks([0.0025], ["0.0025"])
    embedded_svg(figure, tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    assert ">0.0025</text>" in text
    paths = re.findall(r'\sd="([^"]*)"', text)
    assert any("." in path for path in paths)
    assert not [path for path in paths if re.search(r"\.\d{3}", path)]
    point = 'M 1.2345 2.3456e-05" transform="translate(1.2345 2) scale(0.0125 0.0125)'
    assert _shortened(f'<path d="{point}"/>') == (
        '<path d="M 1.23 2.3456e-05" transform="translate(1.23 2) scale(0.0125 0.0125)"/>'
    )


def test_what_was_tried_is_not_called_held() -> None:
    from types import SimpleNamespace

    from actscale_fast.reproduction import tables
    from actscale_fast.reproduction.size import FULL

    tried = {
        name: {"what": name, "steps": 120, "runs": [record(share, 1.0, n=n)]}
        for name, share, n in (("a", 0.97, 400), ("b", 0.5, 400), ("c", 0.85, 20))
    }
    lab: Any = SimpleNamespace(results={"remedies": {"t": {"few": tried}}}, size=FULL)
    found = tables.remedies_table(lab)
    assert found is not None
    assert [row[-1] for row in found.rows] == ["reached", "missed", "not decided"]
    assert "not held or not decided" in tables.tried_words(lab)


def test_what_is_not_held_is_tried_in_other_ways() -> None:
    from types import SimpleNamespace

    from actscale_fast.reproduction import TASKS, plan
    from actscale_fast.reproduction.size import FULL

    found = results(few=[record(0.7, 1.0)])
    by_task = {name: {task.name: found[name]["t"] for task in TASKS} for name in found}
    lab: Any = SimpleNamespace(results=by_task, size=FULL)
    stages = list(plan.remedy_stages(lab))
    assert [stage.where for stage in stages] == [
        ("remedies", task.name, "few", name) for task in TASKS for name in ("0-few-scalars", "1-scalars-by-position")
    ]
    for task in TASKS:
        by_task["comparison"][task.name] = results()["comparison"]["t"]
    assert not list(plan.remedy_stages(lab))
