"""The report of all systems: stages that are kept, claims that are judged by what was measured, pictures beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from word_models import LATE_CAPITALS, save_model

import actscale_fast as af
from actscale_fast.cli import main
from actscale_fast.reproduction import SYSTEMS, TASKS, Size, pictures, recipes
from actscale_fast.reproduction.claims import judged
from actscale_fast.reproduction.comparing import Laboratory
from actscale_fast.reproduction.measuring import by_attribution, jaccard, places, shuffled
from actscale_fast.reproduction.pictures import slots
from actscale_fast.reproduction.stages import Stages
from actscale_fast.tasks import Example

TINY = Size(
    seeds=(0, 1), n_train=8, n_test=4, steps=2, n_path=2, path_steps=2, n_attributed=2, n_sentences=1, max_new_tokens=4
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_model(tmp_path_factory.mktemp("model"), without=LATE_CAPITALS)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_a_finished_one_computes_nothing(
    opened: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, calls = Laboratory.compare, []

    def interrupted(self: Laboratory, *what: Any) -> Any:
        calls.append(what)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return compare(self, *what)

    monkeypatch.setattr(Laboratory, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        af.reproduce(*opened, tmp_path, size=TINY, progress=False)
    assert not (tmp_path / "report.md").exists()
    report = af.reproduce(*opened, tmp_path, size=TINY, progress=False)
    assert len(calls) == 1 + len(SYSTEMS) * len(TASKS) * len(TINY.seeds)  # the one that was interrupted, twice
    text = report.read_text()
    for system in SYSTEMS:
        assert system.title in text
    pictures = {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert pictures == {path.name for path in tmp_path.glob("*.png")}
    assert json.loads((tmp_path / "report.json").read_text())["claims"][0]["held"] in (True, False)

    def never(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(Laboratory, "compare", never)
    monkeypatch.setattr(Laboratory, "baselines", never)
    af.reproduce(*opened, tmp_path, size=TINY, progress=False)
    with pytest.raises(ValueError, match=r"holds a run with other settings .*steps.* differ"):
        af.reproduce(*opened, tmp_path, size=Size(**TINY.to_dict() | {"seeds": (0, 1), "steps": 3}), progress=False)


def test_the_command_line_hands_folder_and_size_over(
    opened: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from actscale_fast.cli import reproduce

    seen: dict[str, Any] = {}

    def run(model: Any, tokenizer: Any, folder: Path, **options: Any) -> Path:
        seen.update(options, folder=folder)
        return folder / "report.md"

    monkeypatch.setattr(reproduce, "run", run)
    monkeypatch.setattr(reproduce, "load_model", lambda _: opened)
    assert main(["reproduce", "--quick", "--out", str(tmp_path / "r")]) == 0
    assert seen == {"quick": True, "folder": tmp_path / "r", "progress": False}  # no terminal, no progress bars
    assert "report.md" in capsys.readouterr().out


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


def figures(correct: float, wrong: float, kl: float = 0.1, n_active: int = 10, n_parameters: int = 100) -> Any:
    return {
        "flip_to_correct": correct, "flip_to_wrong": wrong, "kl": kl, "n_active": n_active, "n_places": 10,
        "n_parameters": n_parameters, "baseline": {"flip_to_correct": 0.0, "flip_to_wrong": 1.0},
    }  # fmt: skip


def results(**changes: Any) -> dict[str, Any]:
    scalars = [{"test": figures(0.9, 1.0)}, {"test": figures(1.0, 0.9)}]
    vectors = [{"test": figures(0.95, 1.0, n_active=1000)}]
    path = [figures(0.5, 0.9, n_active=3), figures(0.86, 0.9, n_active=8), figures(0.95, 0.95, n_active=60)]
    transfer = [
        {"lengths": [9, 9], "systems": {"probes": [figures(1.0, 1.0)]}},
        {"lengths": [20, 30], "systems": {"probes": [figures(0.9, 0.9)]}},
    ]
    found = {"scalars": scalars, "vectors": vectors, "path": path, "transfer": transfer} | changes
    return {
        "comparison": {"t": {f"{name}-by-position": found[name] for name in ("scalars", "vectors")}},
        "path": {"t": found["path"]},
        "transfer": {"t": found["transfer"]},
    }


def held(**changes: Any) -> list[bool]:
    """Effective and faithful, minimal, few, transferred."""
    return [claim.held for claim in judged(results(**changes), ["t"])]


def test_claims_are_held_where_their_criteria_are_met() -> None:
    assert held() == [True, True, True, True]
    found = judged(results(), ["t"])
    assert "8 of 100 heads (8%) flip 0.86 and 0.90" in found[2].found
    assert "flips 1.00 at 9 tokens (frozen 0.50), 0.90 at 30 (0.50)" in found[3].found


@pytest.mark.parametrize(
    ("changes", "which"),
    [
        ({"vectors": [{"test": figures(1.0, 1.0, kl=0.05, n_active=1000)}]}, 0),  # twice the KL
        ({"vectors": [{"test": figures(0.95, 1.0, n_active=99)}]}, 1),
        ({"path": [figures(0.84, 1.0, n_active=5), figures(1.0, 1.0, n_active=21)]}, 2),
        ({"path": [figures(0.84, 1.0, n_active=5)]}, 2),
    ],
)
def test_a_claim_whose_criterion_is_missed_is_not_held(changes: Any, which: int) -> None:
    assert held(**changes) == [number != which for number in range(4)]


def test_what_has_no_effect_is_neither_effective_nor_minimal() -> None:
    at_rest = [{"test": figures(0.0, 1.0, kl=0.0, n_active=0)}]
    assert held(scalars=at_rest, vectors=at_rest)[:2] == [False, False]
    assert held(scalars=[{"test": figures(0.8, 0.9)}])[:2] == [False, False]  # 0.125 fewer


def test_one_length_tests_no_transfer() -> None:
    assert held(transfer=results()["transfer"]["t"][:1])[3] is None


def test_what_does_not_carry_over_is_not_held() -> None:
    rows = results()["transfer"]["t"]
    rows[1]["systems"]["probes"] = [figures(0.6, 1.0)]
    assert held(transfer=rows) == [True, True, True, False]


def test_baselines_have_the_norm_and_number_of_the_learned_scalars(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    train, _ = TASKS[0].examples(tokenizer, TINY, 0)
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


def test_the_pictures_of_recipes_are_named_after_what_the_recipes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr(pictures.plots, "strengths", lambda *_, title, **__: titles.append(title))
    monkeypatch.setattr(recipes, "SUBTRACTED", "Fear")
    monkeypatch.setattr(recipes, "INSTRUCTION", "Answer with a joke.")
    found = {"layer": 3, "rows": [{"strength": 0.0, "perplexity": 9.0}]}
    lab: Any = SimpleNamespace(folder=Path())
    pictures._recipes(lab, dict.fromkeys(("act-add", "mean-centring", "instruction"), found))
    assert titles == [
        "ActAdd, “Love” − “Fear”, layer 3",
        "Mean-centring, texts about the sea, layer 3",
        "Instruction vector, “Answer with a joke.”, layer 3",
    ]
