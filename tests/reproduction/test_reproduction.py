"""The report of all systems: stages that are kept, files that belong together, and several models in one summary."""

from __future__ import annotations

import copy
import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from report_size import TINY
from word_models import LATE_CAPITALS, save_model

import actscale_fast as af
from actscale_fast.cli import main
from actscale_fast.reproduction import (
    FULL,
    PAPER_MODELS,
    QUICK,
    SYSTEMS,
    TASKS,
    comparing,
    laboratory,
    recipes,
    reproduce_models,
    reproducing,
    stressing,
    tables,
)
from actscale_fast.reproduction.measuring import by_attribution, jaccard, measure, places, shuffled
from actscale_fast.reproduction.pictures import slots
from actscale_fast.reproduction.preface import command_of, preface
from actscale_fast.reproduction.stages import Stages
from actscale_fast.reproduction.stress_tables import left_out, stress_table
from actscale_fast.reproduction.tokenizer_digest import tokenizer_digest
from actscale_fast.tasks import Example
from actscale_fast.tasks.known_prompts import _pattern


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_model(tmp_path_factory.mktemp("model"), without=LATE_CAPITALS)
    # A context that is long enough for the prompts of the stress tests.
    model = AutoModelForCausalLM.from_pretrained(folder, max_position_embeddings=256)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def _without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTSCALE_CHECK", "0")  # the check of a fit's gradients takes longer than these fits


@pytest.mark.slow
def test_a_killed_run_goes_on_and_its_files_belong_together(
    opened: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, calls = comparing.compare, []

    def interrupted(*what: Any) -> Any:
        calls.append(what)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return compare(*what)

    monkeypatch.setattr(comparing, "compare", interrupted)
    monkeypatch.setattr(recipes, "latent", lambda _: {"impossible": "left out of this test"})
    folder = tmp_path / "tiny"
    with pytest.raises(KeyboardInterrupt):
        af.reproduce(*opened, folder, size=TINY, progress=False)
    assert not (folder / "report.md").exists()
    summary = reproduce_models([("tiny", lambda: opened)], tmp_path, size=TINY, progress=False)
    assert len(calls) == 1 + len(SYSTEMS) * len(TASKS)  # the one that was interrupted, twice
    _check_files(folder)
    assert "(tiny/report.md)" in summary.read_text()
    assert 'href="tiny/report.html"' in summary.with_suffix(".html").read_text()

    def never(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(comparing, "compare", never)
    monkeypatch.setattr(comparing, "baselines", never)
    monkeypatch.setattr(reproducing, "write_report", lambda *_, **__: summary)  # pictures take time
    af.reproduce(*opened, folder, size=TINY, progress=False)
    with pytest.raises(ValueError, match=r"holds a run with other settings .*steps.* differ"):
        af.reproduce(*opened, folder, size=replace(TINY, steps=7), progress=False)


def _check_files(folder: Path) -> None:
    """The pages name all systems and the frozen model; pictures and data that they mention exist, and no others."""
    text, page = ((folder / f"report.{kind}").read_text() for kind in ("md", "html"))
    for system in SYSTEMS:
        assert system.title in text
        assert system.title in page
    pictures = {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert pictures == {f"pictures/{path.name}" for path in (folder / "pictures").glob("*.png")}
    named = {name.removeprefix("csv/") for name in re.findall(r"csv/[\w-]+\.csv", page)}
    assert named == {path.name for path in (folder / "csv").iterdir()}
    assert not re.search(r"(src|href)=\"(?!data:|#)[^\"]*//", page)  # nothing from the network
    anchors = set(re.findall(r'href="#([\w-]+)"', page))
    assert anchors == set(re.findall(r'<h\d id="([\w-]+)"', page))
    with (folder / "csv" / "country-capital-any-length.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["system"] == "frozen model"
    assert {"correct above wrong, β = +1", "correct above wrong, β = +1, 2.5 %"} <= rows[0].keys()
    claims = json.loads((folder / "report.json").read_text())["claims"]
    assert {claim["verdict"] for claim in claims} <= {"held", "not held", "not decided", "not tested"}


@pytest.mark.parametrize("given", [["--quick"], ["--quick", "--seeds", "3"], ["--models", "demo,other"], ["--paper"]])
def test_the_command_line_hands_models_and_size_over(
    given: list[str], opened: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from actscale_fast.cli import reproduce

    seen: dict[str, Any] = {}
    loaded: list[str | None] = []

    def run(model: Any, tokenizer: Any, folder: Path, **options: Any) -> Path:
        seen.update(options, folder=folder)
        return folder / "report.md"

    def several(models: Any, folder: Path, **options: Any) -> Path:
        seen.update(options, folder=folder, names=[name for name, load in models if load()])
        return folder / "report.md"

    def load(options: Any) -> Any:
        loaded.append(options.model)
        return opened

    monkeypatch.setattr(reproduce, "run", run)
    monkeypatch.setattr(reproduce, "run_several", several)
    monkeypatch.setattr(reproduce, "load_model", load)
    assert main(["reproduce", *given, "--out", str(tmp_path / "r")]) == 0
    common = {"folder": tmp_path / "r", "progress": False}  # no terminal, no progress bars
    if given == ["--quick"]:
        assert seen == common | {"quick": True}
    elif "--seeds" in given:
        assert seen == common | {"quick": False, "size": replace(QUICK, seeds=(0, 1, 2))}
    elif "--paper" in given:
        assert (loaded, seen["names"][-1]) == ([*PAPER_MODELS], "pythia-1.4b")
    else:
        assert (loaded, seen["names"]) == ([None, "other"], ["demo", "other"])
    assert "report.md" in capsys.readouterr().out


def test_models_are_named_in_one_way_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "r")]
    assert main(["reproduce", "--paper", "--models", "a,b", *out]) != 0
    assert "--paper cannot be used with --models" in capsys.readouterr().err
    assert main(["reproduce", "--models", "a,,b", *out]) != 0
    assert "--models: got 'a,,b', expected names or folders" in capsys.readouterr().err
    with pytest.raises(ValueError, match="models: got none, expected at least one name"):
        reproduce_models([], tmp_path)
    with pytest.raises(ValueError, match="'x' more than once"):
        reproduce_models([("x", lambda: (None, None)), ("x", lambda: (None, None))], tmp_path)  # type: ignore[arg-type, return-value]


def test_a_stage_is_kept_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    stages = Stages(tmp_path, {"steps": 1})
    assert stages.run("one", lambda: [1, 2]) == [1, 2]
    assert stages.run("one", lambda: [3]) == [1, 2]
    file = tmp_path / "results" / "one.json"
    whole = file.read_bytes()
    for damaged in (b"{", whole.replace(b"2", b"7", 1), whole + b" "):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"one\.json: damaged .*; delete it to compute this stage again"):
            stages.run("one", lambda: [3])
    file.write_bytes(whole)
    file.rename(tmp_path / "results" / "other.json")
    with pytest.raises(ValueError, match=r"other\.json: belongs to another stage"):
        stages.run("other", lambda: [3])
    (tmp_path / "results" / "other.json").unlink()
    assert stages.run("one", lambda: [3]) == [3]
    assert stages.seconds >= 0


def test_another_chat_template_or_special_token_is_another_tokenizer(opened: tuple[Any, Any]) -> None:
    _, tokenizer = opened
    known = tokenizer_digest(tokenizer)
    other = copy.deepcopy(tokenizer)
    other(["one", "two two"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(other) == known
    other.chat_template = "{{ messages[0].content }} A:"
    with_template = tokenizer_digest(other)
    other.add_special_tokens({"additional_special_tokens": ["<new>"]})
    assert len({known, with_template, tokenizer_digest(other)}) == 3


def test_the_three_parts_of_a_task_share_neither_countries_nor_templates(opened: tuple[Any, Any]) -> None:
    _, tokenizer = opened
    size = replace(TINY, n_train=20, n_validation=10, n_test=12)
    for aligned in (False, True):
        found = TASKS[0].examples(tokenizer, size, 1, aligned=aligned)
        parts = [found.train, found.validation, found.test]
        assert [len(part) for part in parts] == [20, 10, 12]
        answers = [{answer for one in part for answer in (one.correct, one.wrong)} for part in parts]
        assert not answers[0] & answers[1]
        assert not answers[0] & answers[2]
        assert not answers[1] & answers[2]
    found = TASKS[1].examples(tokenizer, size, 1)
    frames = [{_frame(one) for one in part} for part in (found.train, found.validation, found.test)]
    assert not frames[0] & frames[1]
    assert not frames[0] & frames[2]
    assert not frames[1] & frames[2]
    assert TASKS[1].examples(tokenizer, size, 2) != found


@pytest.mark.parametrize("aligned", [False, True])
def test_other_wordings_share_nothing_with_the_training_of_a_system(opened: tuple[Any, Any], aligned: bool) -> None:
    _, tokenizer = opened
    size = replace(TINY, n_train=20, n_validation=10, n_test=12, n_transferred=12)
    capitals, names = TASKS
    for seed in range(4):
        learned = capitals.examples(tokenizer, size, seed, aligned=aligned).train
        answers = {answer for one in learned for answer in (one.correct, one.wrong)}
        for wording in capitals.wordings:
            tested = capitals.reworded(tokenizer, size, seed, wording, aligned=aligned)
            assert len(tested) == 12
            assert not answers & {answer for one in tested for answer in (one.correct, one.wrong)}
            assert not {_template(one) for one in learned} & {_template(one) for one in tested}
        templates = {_template(one) for one in names.examples(tokenizer, size, seed, aligned=aligned).train}
        assert None not in templates
        for wording in names.wordings:
            tested = names.reworded(tokenizer, size, seed, wording, aligned=aligned)
            assert not templates & {_template(one) for one in tested}


def _template(example: Example) -> str | None:
    """The built-in template of a prompt; None if it has another one."""
    every = (
        af.tasks.CONFLICT_TEMPLATES, af.tasks.ALIGNED_CONFLICT_TEMPLATES,
        af.tasks.INDIRECT_OBJECT_TEMPLATES, af.tasks.ALIGNED_INDIRECT_OBJECT_TEMPLATES,
    )  # fmt: skip
    return next((text for some in every for text in some if _pattern(text).fullmatch(example.prompt)), None)


def _frame(example: Example) -> str:
    """The first words of a sentence up to the first name, which tell the built-in templates apart."""
    names = {example.correct.strip(), example.wrong.strip()}
    words = example.prompt.split()
    return " ".join(words[: next(place for place, word in enumerate(words) if word in names)])


def test_a_record_holds_what_evaluate_averages(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    test = TASKS[0].examples(tokenizer, TINY, 0).test
    scalars = af.ActivScalar.for_model(model)
    with torch.no_grad():
        scalars.alpha[1, 0, 2] = 2.0
    (record,) = measure(model, tokenizer, test, [scalars])
    found = af.evaluate(model, tokenizer, test, scalars)
    assert sum(record["correct"]) / len(test) == found.flip_to_correct
    assert sum(record["kl"]) / len(test) == pytest.approx(found.kl, abs=1e-4)
    assert found.baseline is not None
    assert sum(record["frozen"]["wrong"]) / len(test) == found.baseline.flip_to_wrong
    assert (record["n_active"], record["n_places"]) == (1, 1)


def test_baselines_have_the_norm_and_number_of_the_learned_scalars(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    train = TASKS[0].examples(tokenizer, TINY, 0).train
    scalars = af.ActivScalar.for_model(model)
    with torch.no_grad():
        scalars.alpha[0, 0, 1], scalars.alpha[1, 0, 2], scalars.alpha[1, 0, 3] = 0.5, -2.0, 0.25
    found = af.attribution(model, tokenizer, train, knock_out=False, progress=False)
    random, gradient = shuffled(scalars, 3), by_attribution(scalars, found)
    for one in (random, gradient):
        assert one.n_active == 3
        assert one.l1 == pytest.approx(scalars.l1)
    assert sorted(random.alpha.flatten().tolist()) == sorted(scalars.alpha.flatten().tolist())
    assert torch.equal(random.alpha, shuffled(scalars, 3).alpha)
    top = found.scores.flatten().abs().topk(3).indices
    assert set(gradient.alpha.flatten().nonzero().flatten().tolist()) == set(top.tolist())
    assert bool((gradient.alpha.flatten()[top].sign() == found.scores.flatten()[top].sign()).all())


def test_places_are_the_vectors_that_are_changed(opened: tuple[Any, Any]) -> None:
    model, _ = opened
    vectors = af.SteerVec.for_model(model, layers=[1], positions=[0, -1])
    scalars = af.ActivScalar.for_model(model, site="mlp_out")
    with torch.no_grad():
        vectors.vectors[0, 1, 2, 5] = 1.0
        scalars.alpha[0] = 0.1
    assert places(vectors + scalars) == [("head", 1, 1, 2), ("mlp_out", 0, 0, 0)]
    assert jaccard([{1, 2}, {2, 3}, set()]) == [[1.0, 1 / 3, 0.0], [1 / 3, 1.0, 0.0], [0.0, 0.0, 1.0]]


def test_a_slot_that_holds_an_answer_is_named_by_its_role() -> None:
    words = ["The", " capital", " is", " Rome", " Paris", ";", " it"]

    class Words:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return self(text)["input_ids"]

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [words.index(word) for word in re.findall(r" ?\w+|;", text)]}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [words[i] for i in ids]

    example = Example("The capital is Paris; it is", " Rome", " Paris")
    assert slots(Words(), example) == ["The", " capital", " is", "(wrong answer)", ";", " it", " is"]  # type: ignore[arg-type]


def test_equal_time_gives_slower_systems_fewer_steps() -> None:
    times = {"scalars": (8.0, 40), "vectors": (16.0, 40), "probes": (8.5, 40), "few-scalars": (32.0, 80)}
    runs = {name: [{"seconds": seconds, "steps": steps}] for name, (seconds, steps) in times.items()}
    lab: Any = SimpleNamespace(size=replace(TINY, steps=40), results={"comparison": {"country-capital": runs}})
    steps = {
        system.name: comparing.steps_in_equal_time(lab, TASKS[0], system) for system in SYSTEMS if system.name in runs
    }
    assert steps == {"scalars": 40, "few-scalars": 20, "vectors": 20, "probes": 40}
    (words,) = tables.more_steps_words(lab, TASKS[0], aligned=False)
    assert "refit, took up to 80 steps instead of 40 with 1 of 1 seed" in words


def test_a_report_names_the_command_that_it_is_of() -> None:
    assert command_of(FULL) == "actscale-fast reproduce"
    assert command_of(QUICK) == "actscale-fast reproduce --quick"
    assert command_of(replace(QUICK, seeds=(0, 1, 2))) == "actscale-fast reproduce --quick --seeds 3"
    assert "Size(" in command_of(TINY)
    lab: Any = SimpleNamespace(size=replace(QUICK, seeds=(0, 1, 2)))
    words = preface(lab, True, 600.0)
    assert "A quick run: 3 seeds, and fewer" in words
    assert "one seed" not in words
    assert "chosen once" in words
    assert "chosen once" not in preface(SimpleNamespace(size=QUICK), True, 600.0)  # type: ignore[arg-type]


def test_the_stress_table_tells_each_gate_and_what_was_left_out() -> None:
    from actscale_fast.learning.stress.result import Check, Gate

    checks = [
        Check("flips", 0.9, (0.85, 0.95), 0.85, at_least=True),
        Check("drop", 0.3, (0.2, 0.4), 0.25, at_least=False),
    ]
    gates = [stressing.gate_record(Gate("control", checks[:1])), stressing.gate_record(Gate("robustness", checks[1:]))]
    found = {
        "scalars": {"gates": gates, "left_out": {"chats": "no chat template"}},
        "vectors": {"gates": [], "left_out": {"chats": "no chat template", "the whole test": "too long"}},
    }
    lab: Any = SimpleNamespace(results={"stress": {"country-capital": found}})
    rows = [(row[1], row[2], row[-1]) for row in stress_table(lab, TASKS[0]).rows]
    assert rows == [
        ("control", "the gate", "**passed, not decided**"), ("control", "flips", "passed, not decided"),
        ("robustness", "the gate", "**failed, not decided**"), ("robustness", "drop", "failed, not decided"),
    ]  # fmt: skip
    words = left_out(lab, TASKS[0])
    assert words == [
        "Left out for ActivScalar per head; SteerVec per head: chats, no chat template.",
        "Left out for SteerVec per head: the whole test, too long.",
    ]


def test_a_fit_tells_the_steps_and_the_time_of_its_last_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fit(*_: Any, steps: int, **__: Any) -> Any:
        tried.append(steps)
        if steps < 24:
            raise ValueError("n_active: got 2, but the fits of the path leave more")
        return SimpleNamespace(objective=SimpleNamespace(minimality=0.5))

    monkeypatch.setattr(laboratory, "fit", fit)
    lab = laboratory.Laboratory(SimpleNamespace(), None, TINY, Path())  # type: ignore[arg-type]
    monkeypatch.setattr(lab, "_clock", iter((0.0, 10.0, 20.0, 25.0)).__next__)
    made = lab.fitted([], af.ActivScalar, {"faithfulness": 1.0, "lr": 0.1}, 0, 6, n_active=2)  # type: ignore[arg-type]
    assert tried == [6, 12, 24]
    assert made == {"seconds": 5.0, "steps": 24, "minimality": 0.5}
