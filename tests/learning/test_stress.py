"""Stress tests: perturbations keep the answers, figures are those of plain passes, and gates say what they say."""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import word_models
from torch.nn import functional

import actscale_fast as af
from actscale_fast.cli.parser import build_parser
from actscale_fast.cli.stress import THRESHOLDS
from actscale_fast.frozen.chat import user_message
from actscale_fast.learning.stress.figures import worst
from actscale_fast.learning.stress.harness import harness_accuracies
from actscale_fast.learning.stress.perturbations import ASIDES, PERTURBATIONS, NotApplicableError, perturbed
from actscale_fast.learning.stress.plain_text import PROMPTS, TEXTS
from actscale_fast.learning.stress.result import Check, Gate, StressRow

CHAT = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} {% endfor %}<s> answer "
TEXT = "Continue the following text, be brief and reply with the answer only. You are an experienced expert on whom"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    cases = [text for given in word_models.TEXTS for text in (given.lower(), given.upper())]
    return word_models.tokenizer([*word_models.TEXTS, *cases, *ASIDES, *TEXTS, *PROMPTS, TEXT])


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return word_models.model_for(tokenizer, context=256).double()


@pytest.fixture(scope="module")
def test(tokenizer: Any) -> list[af.Example]:
    return af.tasks.country_capital_conflicts(tokenizer, n_train=1, n_test=6).test


@pytest.fixture(scope="module")
def scalars(model: Any) -> af.ActivScalar:
    made = af.ActivScalar.for_model(model)
    with torch.no_grad():
        made.alpha.normal_(generator=torch.Generator().manual_seed(1))
    return made


def logits(model: Any, tokenizer: Any, text: str, scalars: Any, beta: float) -> Any:
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad(), af.patch(model, scalars, beta):
        return model(ids).logits[0]


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_perturbation_changes_the_prompt_and_keeps_the_words_of_the_answers(
    tokenizer: Any, test: list[af.Example], name: str
) -> None:
    tokens = word_models.tokenizer([])
    tokens.chat_template = CHAT
    rule = PERTURBATIONS[name].rule
    made = perturbed(name, rule, test, tokens, seed=3)
    assert made == perturbed(name, rule, test, tokens, seed=3)
    for before, after in zip(test, made, strict=True):
        text = after.prompt or after.messages[-1]["content"]  # type: ignore[index]
        assert (before.prompt, None) != (after.prompt, after.messages)
        for answer in (before.correct.strip(), before.wrong.strip()):
            if name == "paraphrase":
                assert (answer in text) == (answer in before.prompt)
            else:
                assert text.count(answer) == before.prompt.count(answer)
        assert (after.correct.strip(), after.wrong.strip()) == (before.correct.strip(), before.wrong.strip())
        assert text == text.rstrip()


def test_rules_edit_a_chats_last_user_message_and_the_source(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Where was Mary"}, {"role": "assistant", "content": "She was in"}]
    example = af.Example(messages=chat, correct=" Rome", wrong=" Oslo", source="Where was Rome")
    (made,) = perturbed("upper-case", PERTURBATIONS["upper-case"].rule, [example], tokenizer, 0)
    assert made.messages is not None
    assert [message["content"] for message in made.messages] == ["WHERE WAS MARY", "She was in"]
    assert made.source == "WHERE WAS Rome"
    for name, message in (
        ("role-chat", "'role-chat': row 1 of examples cannot be written as a chat: the tokenizer has no chat template"),
        ("paraphrase", "'paraphrase': row 1 of examples is not in a template of a built-in task"),
        ("typos", "'typos': row 1 of examples has no word that can have a typo"),
    ):
        with pytest.raises(NotApplicableError, match=re.escape(message)):
            perturbed(name, PERTURBATIONS[name].rule, [example], tokenizer, 0)


def test_longer_words_keep_their_case_only_where_an_answer_is_their_beginning(tokenizer: Any) -> None:
    for prompt, correct, wrong, expected in (
        ("Answer A or Both: Answer", " A", " B", "ANSWER A OR BOTH: ANSWER"),
        ("No note on Notes, Yesterday", " No", " Yes", "No NOTE ON NOTES, Yesterday"),
        ("The capital is Amsterdam", " Amst", " Par", "THE CAPITAL IS Amsterdam"),
        ("He is in Rome, a Roman said", " Rome", " Rom", "HE IS IN Rome, A Roman SAID"),
    ):
        example = af.Example(prompt, correct, wrong)
        (made,) = perturbed("upper-case", PERTURBATIONS["upper-case"].rule, [example], tokenizer, 0)
        assert made.prompt == expected


def test_typos_leave_names_numbers_and_the_last_word(tokenizer: Any) -> None:
    example = af.Example("Therefore Richard counted about 1234 letters before Charles counted", " seven", " letters")
    for seed in range(20):
        (made,) = perturbed("typos", PERTURBATIONS["typos"].rule, [example], tokenizer, seed)
        before, after = example.prompt.split(" "), made.prompt.split(" ")
        changed = [old for old, new in zip(before, after, strict=True) if old != new]
        assert changed
        assert set(changed) <= {"counted", "about", "before"}
        assert after[-1] == "counted"


def test_figures_are_those_of_plain_passes(
    model: Any, tokenizer: Any, test: list[af.Example], scalars: Any, tmp_path: Path
) -> None:
    texts, prompts = list(TEXTS[:3]), list(PROMPTS[:4])
    own = {"shouted": lambda example: replace(example, prompt="TEXT: " + example.prompt)}
    result = af.stress(
        model, tokenizer, scalars, test, strength=0.5, perturbations=["paraphrase", "length-1"], own_perturbations=own,
        texts=texts, prompts=prompts, batch_size=4,
    )  # fmt: skip
    rows = {row.name: row for row in result.rows}
    assert [row.name for row in result.rows if row.gate == "control"] == [
        "as given",
        "paraphrase",
        "length-1",
        "shouted",
    ]
    sets: dict[str, list[af.Example]] = {"as given": test, "shouted": [own["shouted"](example) for example in test]}
    for name in ("paraphrase", "length-1"):
        sets[name] = perturbed(name, PERTURBATIONS[name].rule, test, tokenizer, 0)
    flips = {}
    for name, some in sets.items():
        shares = torch.zeros(2, len(some))
        for column, example in enumerate(some):
            ids = [
                tokenizer(answer, add_special_tokens=False)["input_ids"][0]
                for answer in (example.correct, example.wrong)
            ]
            for index, beta in enumerate((0.5, -0.5)):
                z = logits(model, tokenizer, example.prompt, scalars, beta)[-1]
                shares[index, column] = float((z[ids[0]] - z[ids[1]]) * beta > 0)
        figures = rows[name].figures
        assert (figures["correct"], figures["wrong"]) == pytest.approx(tuple(shares.mean(1).tolist()))
        flips[name] = shares.mean()
        assert figures["drop"] == pytest.approx(float(flips["as given"] - flips[name]), abs=1e-6)
    assert result.gate("control").checks[0].value == pytest.approx(float(sum(flips.values()) / 4), abs=1e-6)
    for name, beta in (("frozen", 0.0), ("plus", 0.5), ("minus", -0.5)):
        logs = []
        for text in texts:
            tokens = torch.tensor(tokenizer(text)["input_ids"])
            z = logits(model, tokenizer, text, scalars, beta)
            logs.append(functional.cross_entropy(z[:-1], tokens[1:]))
        assert rows["plain texts"].figures[name] == pytest.approx(math.exp(sum(logs) / 3), rel=1e-5)
        if beta:
            kl = [
                functional.kl_div(
                    logits(model, tokenizer, text, scalars, beta)[-1].log_softmax(-1),
                    logits(model, tokenizer, text, scalars, 0.0)[-1].log_softmax(-1), reduction="sum", log_target=True,
                )
                for text in prompts
            ]  # fmt: skip
            assert rows["unrelated prompts"].figures[name] == pytest.approx(float(sum(kl)) / 4, rel=1e-5)
    assert "greater-than" in result.left_out  # this tokenizer has no digits
    assert result.gate("robustness").checks[1].what == "largest side effect, indirect-object"
    result.save(tmp_path / "stress.json")
    again = af.StressResult.load(tmp_path / "stress.json")
    assert again.to_dict() == result.to_dict()
    assert str(again) == str(result)
    assert "robustness: " in str(result)
    result.plot(tmp_path / "stress.png")
    assert (tmp_path / "stress.png").stat().st_size > 1000
    (tmp_path / "stress.json").write_text("{}")
    with pytest.raises(ValueError, match=r"stress\.json"):
        af.StressResult.load(tmp_path / "stress.json")


def test_an_intervention_that_does_nothing_costs_nothing_and_gains_nothing(
    model: Any, tokenizer: Any, test: list[af.Example]
) -> None:
    result = af.stress(
        model, tokenizer, af.ActivScalar.for_model(model), test, direction="correct", min_control=0.0,
        perturbations=["length-1", "lower-case"], texts=TEXTS[:2], prompts=PROMPTS[:2], unrelated={"same": test},
        accuracies={"quiz": (0.5, 0.5)},
    )  # fmt: skip
    assert [gate.passed for gate in result.gates] == [False, True, True]
    assert [check.passed for check in result.gates[0].checks] == [True, False]
    assert result.gate("control").checks[1].value == 0.0
    ratio, kl, accuracy = result.gate("utility").checks
    assert ratio.value == pytest.approx(1.0, abs=1e-9)
    assert kl.value == pytest.approx(0.0, abs=1e-9)
    assert accuracy.value == 0.0
    assert result.gate("robustness").checks[1].value == 0.0
    assert not result.passed
    columns, rows = result.table()
    assert all(row[columns.index("β = −1")] == "" for row in rows)


def test_a_run_twice_reads_each_text_and_an_interchange_has_none(
    model: Any, tokenizer: Any, test: list[af.Example]
) -> None:
    twice = af.RunTwice.for_prompts(model, 80)
    with torch.no_grad():
        twice.alpha.fill_(0.3)
    options: dict[str, Any] = {"perturbations": ["length-1"], "unrelated": {}}
    result = af.stress(model, tokenizer, twice, test, texts=TEXTS[:2], prompts=PROMPTS[:2], **options)
    row = next(row for row in result.rows if row.name == "plain texts")
    assert row.figures["plus"] != row.figures["frozen"] != row.figures["minus"]
    exchange = af.HeadInterchange.for_model(model, positions=[-1])
    with pytest.raises(ValueError, match="got a HeadInterchange, which takes activations from a second prompt"):
        af.stress(model, tokenizer, exchange, test, **options)
    paired = [replace(example, source=example.prompt) for example in test]
    result = af.stress(model, tokenizer, exchange, paired, perturbations=["length-1"], texts=[], prompts=[])
    assert result.gate("utility").passed is None
    assert "utility: not measured" in str(result)
    assert "indirect-object" in result.left_out


def test_the_perplexity_is_left_out_where_not_every_token_is_steered(
    model: Any, tokenizer: Any, test: list[af.Example]
) -> None:
    options: dict[str, Any] = {"perturbations": ["length-1"], "unrelated": {}, "prompts": PROMPTS[:2]}
    for positions in ([-1], [0, 1]):
        last = af.ActivScalar.for_model(model, positions=positions)
        with torch.no_grad():
            last.alpha.fill_(2.0)
        result = af.stress(model, tokenizer, last, test[:2], **options)
        assert [check.what for check in result.gate("utility").checks] == ["KL"]
        assert result.gate("utility").checks[0].value > 0
        assert "would not steer every token of a text" in result.left_out["plain texts"]
        assert result.left_out["plain texts"] in str(result)
        everywhere = af.ActivScalar.for_model(model)
        both = af.stress(model, tokenizer, last + everywhere, test[:2], **options)
        assert "plain texts" in both.left_out


def test_the_examples_own_task_is_no_unrelated_behaviour_in_chats_either(
    model: Any, tokenizer: Any, scalars: Any
) -> None:
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = CHAT
    made = af.tasks.indirect_object_identification(tokenizer, n_train=1, n_test=2).test
    chats = [
        replace(
            one, prompt="", messages=({"role": "system", "content": "Names."}, *user_message(one.prompt)),
            correct=one.correct.strip(), wrong=one.wrong.strip(),
        )
        for one in made
    ]  # fmt: skip
    own = [replace(one, prompt=f"Rome: {one.prompt}") for one in made]  # as in templates of the user's own
    options: dict[str, Any] = {"perturbations": ["length-1"], "texts": [], "prompts": []}

    def behaviours(examples: list[af.Example], **more: Any) -> list[str]:
        found = af.stress(model, talking, scalars, examples, **options, **more)
        return [row.name for row in found.rows if row.kind == "unrelated"]

    assert behaviours(made) == behaviours(chats) == behaviours(own, task="indirect-object") == []
    assert behaviours(own) == ["indirect-object"]


def test_an_intervention_whose_positions_a_longer_prompt_does_not_fit_names_the_perturbation(
    model: Any, tokenizer: Any, test: list[af.Example]
) -> None:
    twice = af.RunTwice.for_prompts(model, 30)
    with pytest.raises(ValueError, match=r"perturbation 'length-4': row 1 of texts: the prompt has .. tokens"):
        af.stress(model, tokenizer, twice, test, perturbations=["length-4"], texts=[], prompts=[], unrelated={})


def test_what_nobody_named_is_left_out_where_it_cannot_be_measured(tokenizer: Any, test: list[af.Example]) -> None:
    longest = max(len(tokenizer(example.prompt)["input_ids"]) for example in test[:2])
    short = word_models.model_for(tokenizer, context=longest + 3)
    scalars = af.ActivScalar.for_model(short)
    result = af.stress(short, tokenizer, scalars, test[:2])
    reasons = {name: result.left_out[name] for name in ("length-1", "length-4", "role-expert", "plain texts")}
    assert all("tokens, expected at most" in reason for reason in reasons.values()), reasons
    assert {row.name for row in result.rows if row.gate == "control"} >= {"as given", "lower-case", "upper-case"}
    assert not {row.name for row in result.rows} & set(result.left_out)
    assert [check.what for check in result.gate("utility").checks] == ["KL"]
    with pytest.raises(ValueError, match="perturbation 'length-4'"):
        af.stress(short, tokenizer, scalars, test[:2], perturbations=["length-4"], unrelated={}, texts=[], prompts=[])
    long = {"unrelated": {"long": [replace(test[0], prompt=test[0].prompt * 3)]}}
    with pytest.raises(ValueError, match="unrelated 'long'"):
        af.stress(short, tokenizer, scalars, test[:2], perturbations=["lower-case"], texts=[], prompts=[], **long)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": 0}, "strength: got 0"),
        ({"strength": -0.5}, "strength: got -0.5, expected more than 0"),
        ({"strength": math.nan}, "strength: got nan"),
        ({"direction": "up"}, "direction: got 'up'"),
        ({"perturbations": ["typo"]}, "perturbations: got 'typo', expected some of .*; did you mean 'typos'"),
        ({"perturbations": "typos"}, "perturbations: got a string"),
        ({"perturbations": ["role-chat"]}, "'role-chat': row 1 of examples cannot be written as a chat"),
        ({"perturbations": ["spaces"]}, "perturbation 'spaces': changes no token of the prompts"),
        ({"own_perturbations": {"typos": str}}, "own_perturbations: the name 'typos' is taken"),
        (
            {"own_perturbations": {"same": lambda example: example}},
            "perturbation 'same': changes no token of the prompts",
        ),
        ({"own_perturbations": {"text": lambda example: "text"}}, "perturbation 'text': got str from its function"),
        ({"accuracies": {"quiz": (2, 0)}}, r"accuracies: got \(2, 0\) for 'quiz'"),
        ({"max_kl": "much"}, "max_kl: got 'much'"),
        ({"unrelated": []}, "unrelated: got list, expected a dict"),
        ({"task": "names"}, "task: got 'names', expected None or one of 'indirect-object', 'greater-than'"),
    ],
)
def test_bad_arguments_are_refused(
    model: Any, tokenizer: Any, test: list[af.Example], scalars: Any, given: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        af.stress(
            model, tokenizer, scalars, test, **{"perturbations": ["length-1"], "texts": [], "prompts": []} | given
        )


def test_a_verdict_is_decided_where_the_interval_leaves_out_the_threshold() -> None:
    sure = Check("flipped", 0.9, (0.85, 0.95), 0.8, True)
    unsure = Check("drop", 0.1, (0.0, 0.3), 0.2, False)
    bad = Check("KL", 0.5, (0.4, 0.6), 0.1, False)
    assert (sure.passed, sure.decided, unsure.passed, unsure.decided, bad.passed) == (True, True, True, False, False)
    assert (Gate("control", [sure]).passed, Gate("control", [sure]).decided) == (True, True)
    assert (Gate("utility", [sure, unsure]).passed, Gate("utility", [sure, unsure]).decided) == (True, False)
    assert (Gate("utility", [unsure, bad]).passed, Gate("utility", [unsure, bad]).decided) == (False, True)
    rows = [
        StressRow("control", name, "", 9, {"drop": value}, {"drop": ends})
        for name, value, ends in (("typos", 0.1, (0.1, 0.1)), ("spaces", 0.05, (-0.1, 0.3)))
    ]
    (largest,) = worst("largest drop", rows, "drop", 0.2)
    assert (largest.value, largest.interval, largest.passed, largest.decided) == (0.1, (0.1, 0.3), True, False)
    assert str(largest) == "largest drop, typos: 0.10 [0.10, 0.30] (at most 0.2, not decided)"
    assert str(Gate("utility", [bad])) == "utility: FAILED: KL 0.50 [0.40, 0.60] (at most 0.1, failed)"


def test_the_harnesss_results_become_accuracies() -> None:
    frozen = {
        "results": {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1}, "b": {"exact_match,flex": 0.25}}
    }
    plus = {"results": {"a": {"acc,none": 0.4}, "b": {"exact_match,flex": 0.3}}}
    minus = {"results": {"a": {"acc,none": 0.45}, "b": {"exact_match,flex": 0.1}}}
    assert harness_accuracies(frozen, plus, minus) == {"a": (0.5, 0.4), "b": (0.25, 0.1)}
    with pytest.raises(ValueError, match="steered: got the tasks a, expected those of the frozen model: a, b"):
        harness_accuracies(frozen, {"results": {"a": {"acc,none": 0.4}}})
    with pytest.raises(ValueError, match="the task 'a' has none of the metrics"):
        harness_accuracies({"results": {"a": {"perplexity,none": 3.0}}}, plus)
    both = [
        {"results": {"a": {"exact_match,strict": 0.5, "exact_match,flexible": 0.75}}},
        {"results": {"a": {"exact_match,flexible": 0.25, "exact_match,strict": 0.125}}},
    ]
    assert harness_accuracies(*both) == {"a": (0.5, 0.125)}
    with pytest.raises(ValueError, match="steered: the task 'a' has no 'acc,none', which the frozen model's"):
        harness_accuracies({"results": {"a": {"acc,none": 0.5}}}, {"results": {"a": {"acc_norm,none": 0.9}}})
    with pytest.raises(ValueError, match="steered: got no results"):
        harness_accuracies(frozen)


def test_the_command_line_has_the_same_thresholds_and_perturbations() -> None:
    words = ["stress", "folder"]
    options = vars(build_parser().parse_args(words))
    defaults = {name: one.default for name, one in inspect.signature(af.stress).parameters.items()}
    for name in (*THRESHOLDS, "strength", "direction", "perturbations", "batch_size"):
        assert options[name] == defaults[name], name
    command, _ = build_parser().subparser(words)
    told = " ".join(command.format_help().split()).replace("role- ", "role-")
    assert all(name in told for name in PERTURBATIONS)


def test_the_command_line_tests_what_a_fit_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from actscale_fast.cli import main

    folder = str(word_models.save_model(tmp_path / "model"))
    rows = [af.Example(f"The capital of {c} is {w}.", f" {r}", f" {w}") for c, r, w in (
        ("Germany", "Berlin", "Paris"), ("France", "Paris", "Rome"), ("Italy", "Rome", "Oslo"),
    )]  # fmt: skip
    af.save_examples(tmp_path / "test.jsonl", rows)
    data = str(tmp_path / "test.jsonl")
    fitted = ["fit", "--model", folder, "--data", data, "--test-data", data, "--steps", "1", "--layers", "1"]
    assert main([*fitted, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    (tmp_path / "texts.txt").write_text("The capital of France\n\nIs it true?\n")
    for name, value in (("frozen", 0.5), ("steered", 0.25)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": {"quiz": {"acc,none": value}}}))
    capsys.readouterr()
    words = [
        "stress",
        str(tmp_path / "out"),
        "--n-prompts",
        "2",
        "--perturbations",
        "lower-case,instruction-brief",
        "--json",
    ]
    words += ["--texts", str(tmp_path / "texts.txt"), "--max-drop", "1", "--out", str(tmp_path / "stress.json")]
    words += ["--harness", str(tmp_path / "frozen.json"), str(tmp_path / "steered.json")]
    assert main([*words, "--plot", str(tmp_path / "stress.png")]) == 0
    shown = json.loads(capsys.readouterr().out)
    result = af.StressResult.load(tmp_path / "stress.json")
    assert result.n_examples == 2
    assert result.to_dict() == shown
    assert result.gate("utility").checks[-1].value == 0.25
    assert result.gate("robustness").checks[0].threshold == 1
    assert (tmp_path / "stress.png").exists()
    assert main(["stress", str(tmp_path / "out"), "--texts", str(tmp_path / "none.txt"), "--quiet"]) == 1
    assert "texts: there is no file" in capsys.readouterr().err


def test_the_command_line_names_the_task_of_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from actscale_fast import learning
    from actscale_fast.cli import main

    folder, seen = str(word_models.save_model(tmp_path / "model")), []
    fitted = ["fit", "--model", folder, "--task", "indirect-object", "--n-train", "2", "--n-test", "2", "--steps", "1"]
    assert main([*fitted, "--layers", "1", "--out", str(tmp_path / "out"), "--quiet"]) == 0

    def noted(*_: Any, task: str | None, **__: Any) -> Any:
        seen.append(task)
        raise ValueError("noted")

    monkeypatch.setattr(learning, "stress", noted)
    assert main(["stress", str(tmp_path / "out"), "--quiet"]) == 1
    assert main(["stress", str(tmp_path / "out"), "--task", "country-capital", "--n-test", "2", "--quiet"]) == 1
    assert seen == ["indirect-object", None]
