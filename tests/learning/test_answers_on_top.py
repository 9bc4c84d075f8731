"""Top token, rank, probability, new flips and bootstrap intervals of an evaluation, against plain derivations."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny
import torch
from fit_cases import conflicts

import actscale_fast as af
from actscale_fast.learning.answer_ranks import answer_ranks
from actscale_fast.learning.bootstrap import RESAMPLES, intervals
from actscale_fast.learning.evaluate import Evaluation
from actscale_fast.learning.sweep.fit_folder import checked_evaluation


@torch.no_grad()
def test_top_rank_probability_and_new_flips_are_those_of_a_plain_derivation() -> None:
    model, tokenizer, examples = tiny.llama(dtype=torch.float64), tiny.tokenizer(), conflicts(9)
    scalars = af.ActivScalar.for_model(model)
    scalars.alpha.copy_(torch.randn(scalars.alpha.shape, generator=torch.Generator().manual_seed(1)))
    result = af.evaluate(model, tokenizer, examples, scalars, batch_size=4)
    found: dict[tuple[str, int], list[tuple[bool, int, float, bool]]] = {}
    for example in examples:
        ids = tokenizer(example.prompt, return_tensors="pt")["input_ids"]
        words = {"correct": example.correct.strip(), "wrong": example.wrong.strip()}
        tokens = {name: tokenizer.convert_tokens_to_ids(word) for name, word in words.items()}
        for beta in (0, 1, -1):
            with af.patch(model, scalars, strength=float(beta)):
                z = model(ids).logits[0, -1]
                generated = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=1)[0, -1]
            order = z.argsort(descending=True).tolist()
            above = bool(z[tokens["correct"]] > z[tokens["wrong"]])
            for name, token in tokens.items():
                own = (bool(generated == token), 1 + order.index(token), float(z.softmax(-1)[token]))
                found.setdefault((name, beta), []).append((*own, above if name == "correct" else not above))
    for name, beta in (("correct", 1), ("wrong", -1)):
        for evaluation, rows in ((result, found[name, beta]), (result.baseline, found[name, 0])):
            assert evaluation is not None
            tops, ranks, probabilities, _ = zip(*rows, strict=True)
            assert getattr(evaluation, f"top_{name}") == pytest.approx(sum(tops) / 9)
            assert getattr(evaluation, f"rank_{name}") == sorted(ranks)[4]
            assert getattr(evaluation, f"probability_{name}") == pytest.approx(sum(probabilities) / 9, rel=1e-6)
        others = [after[3] for before, after in zip(found[name, 0], found[name, beta], strict=True) if not before[3]]
        assert 0 < len(others) < 9
        assert getattr(result, f"newly_{name}") == pytest.approx(sum(others) / len(others))
        assert f"… of the {len(others)} prompts where it was not" in [label for label, _, _ in result.rows()]


@torch.no_grad()
def test_whole_answers_are_on_top_where_each_of_their_tokens_is() -> None:
    model, tokenizer, drawn = tiny.llama(dtype=torch.float64), tiny.tokenizer(), random.Random(1)
    pairs = [(" Paris Rome", " Berlin"), (" Oslo", " Madrid A B"), (" Rome A", " Rome B"), (" Rome", " Oslo")]
    scalars = af.ActivScalar.for_model(model)
    scalars.alpha.copy_(torch.randn(scalars.alpha.shape, generator=torch.Generator().manual_seed(1)))
    examples = []
    for number in range(8):
        prompt = " ".join(drawn.choices(tiny.WORDS[4:], k=3 + number % 3))
        correct, wrong = pairs[number % 4]
        if number % 2:  # what greedy generation gives under β = +1 is on top
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            with af.patch(model, scalars):
                made = model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=1)
            correct = "".join(f" {tiny.WORDS[token]}" for token in made[0, ids.shape[1] :].tolist())
        examples.append(af.Example(prompt, correct, wrong))
    result = af.evaluate(model, tokenizer, examples, scalars, batch_size=3)
    for name, beta in (("correct", 1), ("wrong", -1)):
        for evaluation, strength in ((result, beta), (result.baseline, 0)):
            tops, ranks, probabilities = [], [], []
            for example in examples:
                ids = tokenizer(example.prompt)["input_ids"]
                top, total, first = True, 0.0, 0
                for token in tokenizer(getattr(example, name))["input_ids"]:
                    with af.patch(model, scalars, strength=float(strength)):
                        z = model(torch.tensor([ids])).logits[0, -1]
                    top &= bool(z.argmax() == token)
                    total += float(z.log_softmax(-1)[token])
                    first = first or 1 + z.argsort(descending=True).tolist().index(token)
                    ids = [*ids, token]
                tops.append(top)
                ranks.append(first)
                probabilities.append(torch.tensor(total).double().exp())
            assert getattr(evaluation, f"top_{name}") == pytest.approx(sum(tops) / 8)
            assert getattr(evaluation, f"rank_{name}") == sorted(ranks)[3]
            assert getattr(evaluation, f"probability_{name}") == pytest.approx(float(sum(probabilities)) / 8, rel=1e-5)
    assert result.top_correct is not None
    assert result.top_correct > 0.2


def test_new_flips_have_no_value_where_nothing_was_to_be_flipped() -> None:
    model = tiny.llama()
    always = [example for example in conflicts(30) if _is_correct(model, example)][:4]
    result = af.evaluate(model, tiny.tokenizer(), always, af.ActivScalar.for_model(model))
    assert result.newly_correct is None
    assert result.newly_wrong == 0
    assert "newly_correct" not in result.intervals
    assert not any(label == "… of the 0 prompts where it was not" for label, _, _ in result.rows())


def _is_correct(model: object, example: af.Example) -> bool:
    found = af.evaluate(model, tiny.tokenizer(), [example], af.ActivScalar.for_model(model))  # type: ignore[arg-type]
    return found.flip_to_correct == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 31, 50257])
def test_ranks_are_places_in_the_sorted_logits(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actscale_fast.learning.answer_ranks._AT_ONCE", 2 * width)  # two rows at a time
    generator = torch.Generator().manual_seed(width)
    logits = (3 * torch.randn(5, width, generator=generator)).to(dtype)
    answers = torch.randint(width, (5,), generator=generator)
    answers[0] = logits[0].argmax()
    found = answer_ranks(logits, answers)
    order = logits.sort(dim=-1, descending=True, stable=True).indices  # in bfloat16 many are equal
    assert found.rank.tolist() == [1 + order[row].tolist().index(int(answer)) for row, answer in enumerate(answers)]
    assert found.top.tolist() == [float(order[row, 0] == answer) for row, answer in enumerate(answers)]
    exact = logits.double().log_softmax(-1).gather(-1, answers[:, None]).squeeze(-1)
    torch.testing.assert_close(found.log_probability, exact, rtol=1e-6, atol=1e-5)


def test_intervals_are_percentiles_of_resampled_prompts() -> None:
    drawn = random.Random(0)
    values = [drawn.gauss(0, 1) for _ in range(40)]
    values[3] = float("nan")  # this prompt does not count
    given = torch.tensor(values, dtype=torch.float64)
    found = intervals({"mean": given, "none": torch.full((40,), torch.nan)}, {"median": torch.arange(40.0)})
    means, medians = [], []
    for _ in range(4 * RESAMPLES):
        rows = [drawn.randrange(40) for _ in range(40)]
        own = [values[row] for row in rows if row != 3]
        means.append(sum(own) / len(own))
        medians.append(sorted(rows)[19])
    for name, statistics in (("mean", means), ("median", medians)):
        statistics.sort()
        expected = (statistics[round(0.025 * len(statistics))], statistics[round(0.975 * len(statistics))])
        spread = expected[1] - expected[0]
        assert found[name] == pytest.approx(expected, abs=0.08 * spread)  # 2000 draws: the ends vary by 3 %
    assert "none" not in found
    assert intervals({"mean": given}, {})["mean"] == found["mean"]  # a fixed seed


def test_many_prompts_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = intervals({"mean": values}, {"median": values})
    monkeypatch.setattr("actscale_fast.learning.bootstrap._AT_ONCE", 50 * 300)
    assert intervals({"mean": values}, {"median": values}) == whole


def test_the_table_has_the_frozen_model_and_the_intervals_and_json_keeps_both() -> None:
    model = tiny.llama()
    result = af.evaluate(model, tiny.tokenizer(), conflicts(6), af.ActivScalar.for_model(model))
    columns, rows = result.table()
    assert columns == ["", "before", "after", "95 % interval"]
    told = {label: cells for label, *cells in rows}
    low, high = result.intervals["top_correct"]
    share = f"{result.top_correct:.2f}"
    assert told["correct is the top token, β = +1"] == [share, share, f"{low:.2f} to {high:.2f}"]
    assert low <= result.top_correct <= high
    assert result.baseline is not None
    assert result.baseline.intervals["top_correct"] == (low, high)
    again = json.loads(json.dumps(result.to_dict()))
    assert Evaluation.from_dict(again) == result
    assert checked_evaluation(Path("evaluation.json"), again) == result
    assert hash(result) == hash(Evaluation.from_dict(again))


def test_an_evaluation_of_an_earlier_version_is_read_and_a_damaged_one_is_not() -> None:
    older = Evaluation(7, 0.5, 0.25, 1.0, -1.0, 0.3, 0.2, 0.4, 0.9, 3, 12, 1.5)
    kinds = ("newly", "top", "rank", "probability")
    newer = ["intervals", *(f"{kind}_{answer}" for kind in kinds for answer in ("correct", "wrong"))]
    told = {name: value for name, value in older.to_dict().items() if name not in newer}
    path = Path("evaluation.json")
    assert checked_evaluation(path, told) == older
    assert [label for label, _, _ in older.rows()][:2] == ["correct above wrong, β = +1", "wrong above correct, β = −1"]
    for change in (
        {"kl": None},
        {"top_correct": "x"},
        {"intervals": {"kl": [0.1]}},
        {"intervals": {"kl": [0.1, "x"]}},
        {"other": 1},
    ):
        with pytest.raises(ValueError, match="damaged"):
            checked_evaluation(path, told | change)
    with pytest.raises(ValueError, match="damaged"):
        checked_evaluation(path, {name: value for name, value in told.items() if name != "baseline"})
