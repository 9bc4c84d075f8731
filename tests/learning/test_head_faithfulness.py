"""Necessity and sufficiency of heads against a plain loop, and evaluations of each kind of conflict."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import word_models
from test_circuit_metrics import examples, plain

import actscale_fast as af
from actscale_fast.learning.bootstrap import intervals
from actscale_fast.learning.head_selection.faithfulness import HeadFaithfulness, _rows
from actscale_fast.tasks.examples import Example


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(dtype=torch.float64)


def test_necessity_and_sufficiency_are_those_of_a_plain_loop(model: Any, tmp_path: Any) -> None:
    chosen = torch.zeros(3, 4, dtype=torch.bool)
    chosen[0, 1] = chosen[2, 3] = chosen[1, 0] = True
    found = af.head_faithfulness(model, tiny.tokenizer(), examples(), chosen, n_random=2, batch_size=4)
    every = torch.ones(3, 4, dtype=torch.bool)
    assert (found.k, found.n_heads, len(found.rows)) == (3, 12, 12)
    for ablation in ("zero", "interchange"):
        full, empty = plain(model, every, ablation), plain(model, ~every, ablation)
        without, only = plain(model, ~chosen, ablation), plain(model, chosen, ablation)
        necessity, sufficiency = (full - without) / (full - empty), (only - empty) / (full - empty)
        assert found.necessity(ablation) == pytest.approx(necessity, rel=1e-5)  # type: ignore[arg-type]
        assert found.sufficiency(ablation) == pytest.approx(sufficiency, rel=1e-5)  # type: ignore[arg-type]
    rows = {(row.ablation, row.circuit): row for row in found.rows}
    row = rows["zero", "all but the chosen"]
    low, high = row.intervals["share"]
    assert row.share is not None
    assert low <= row.share <= high
    assert rows["zero", "all"].share is None
    assert "Faithfulness of 3 of 12 heads (6 prompts)" in str(found)
    found.save(tmp_path / "faithfulness.json")


def test_a_selection_has_the_same_figures_as_its_heads(model: Any) -> None:
    without = [Example(e.prompt, e.correct, e.wrong) for e in examples()]
    selection = af.select_heads(
        model, tiny.tokenizer(), without, "attribution", 2, strength=1.0, progress=False, layers=[0, 2]
    )
    found = af.head_faithfulness(model, tiny.tokenizer(), without, selection, n_random=0)
    again = af.head_faithfulness(model, tiny.tokenizer(), without, selection.chosen, layers=[0, 2], n_random=0)
    assert found.to_dict() == again.to_dict()
    assert {row.ablation for row in found.rows} == {"zero"}  # no example has a source
    with pytest.raises(ValueError, match="ablation: got 'interchange', which was not measured"):
        found.necessity("interchange")


def test_shares_of_an_effect_that_may_be_none_are_not_shown() -> None:
    every, none = torch.tensor([2.0, -2.0, 3.0, -2.0]), torch.tensor([0.0, 0.1, 0.0, -0.1])
    names = ("all", "all but the chosen", "only the chosen", "none")
    for shift, known in ((0.0, False), (9.0, True), (-9.0, True)):
        differences = dict(zip(names, (every + shift, none, every + shift, none), strict=True))
        rows = _rows("zero", differences, {name: (values > 0).double() for name, values in differences.items()})
        found = HeadFaithfulness(rows, 1, 2, 0, 4)
        assert rows[0].intervals["effect"] == pytest.approx(
            intervals({"effect": every + shift - none}, {})["effect"], abs=1e-6
        )
        assert found.has_effect() is known
        assert ("necessity 1.00 [1.00, 1.00]" in str(found)) is known
        assert ("necessity not known" in str(found)) is not known
        assert ("zero: the effect of all heads may be 0 (from " in str(found)) is not known
    with pytest.raises(ValueError, match="ablation: got 'interchange', which was not measured"):
        found.has_effect("interchange")


def test_what_is_no_choice_of_heads_is_refused(model: Any) -> None:
    for chosen, message in (
        (torch.zeros(3, 4), "selection: got Tensor, expected a HeadSelection or a bool tensor"),
        (torch.ones(2, 4, dtype=torch.bool), r"selection: got shape \(2, 4\), expected"),
        (torch.zeros(3, 4, dtype=torch.bool), "selection: got no head"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            af.head_faithfulness(model, tiny.tokenizer(), examples(), chosen)
    with pytest.raises(ValueError, match="ablation: got 'mean'"):
        af.head_faithfulness(
            model, tiny.tokenizer(), examples(), torch.ones(3, 4, dtype=torch.bool), ablations=["mean"]  # type: ignore[list-item]
        )  # fmt: skip

    with pytest.raises(ValueError, match="ablations: got 'zero' more than once"):
        af.head_faithfulness(
            model, tiny.tokenizer(), examples(), torch.ones(3, 4, dtype=torch.bool), ablations=["zero", "zero"]
        )


def test_an_interval_of_a_ratio_is_that_of_resampled_means() -> None:
    above, below = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2.0, 2.0, 2.0])
    found = intervals({"mean": above / 2}, {}, {"ratio": (above, below)})
    assert found["ratio"] == pytest.approx(found["mean"])


def test_conflicts_are_evaluated_by_kind(tmp_path: Any) -> None:
    texts = [text for templates in af.tasks.KNOWLEDGE_CONFLICT_TEMPLATES.values() for text in templates]
    tokenizer = word_models.tokenizer([*word_models.TEXTS, *texts])
    model = word_models.model_for(tokenizer, context=128)
    scalars = af.ActivScalar.for_model(model)
    with torch.no_grad():
        scalars.alpha.normal_(generator=torch.Generator().manual_seed(1))
    _, test = af.tasks.knowledge_conflicts(tokenizer, n_train=3, n_test=12)
    found = af.evaluate_conflicts(model, tokenizer, test, scalars)
    assert list(found.kinds) == list(af.tasks.CONFLICT_KINDS)
    for kind, one in found.kinds.items():
        own = [example for example in test if af.tasks.conflict_kind(example) == kind]
        alone = af.evaluate(model, tokenizer, own, scalars)
        assert one.n_examples == len(own) == 4
        for name in ("flip_to_correct", "flip_to_wrong", "kl", "logit_difference"):
            assert getattr(one, name) == pytest.approx(getattr(alone, name), rel=1e-4, abs=1e-6)
    whole = af.evaluate(model, tokenizer, test, scalars)
    assert found.mean.logit_difference == pytest.approx(whole.logit_difference, rel=1e-5)
    assert "Knowledge conflicts, 12 prompts" in str(found)
    found.save(tmp_path / "conflicts.json")
    with pytest.raises(ValueError, match="row 1 of examples: got a prompt that is no knowledge conflict"):
        af.evaluate_conflicts(model, tokenizer, [("The capital of Norway is Oslo", " Oslo", " Cairo")], scalars)
