"""lm-evaluation-harness tasks run with an intervention on, and its figures are those of the patched model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import tiny
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import actscale_fast as af
from actscale_fast.integrations.lm_eval import SteeredLM, accuracies

QUESTIONS = [
    ("The capital of A is", ["Paris", "Berlin"], 0),
    ("The capital of B is what", ["Rome in two", "Oslo"], 1),
    ("Q what is the answer", ["one", "two three"], 1),
    ("A is", ["Madrid", "C"], 0),
]


def task(folder: Path) -> dict[str, Any]:
    """A multiple-choice task of the harness over a local file."""
    data = folder / "questions.json"
    data.write_text("\n".join(json.dumps({"q": q, "choices": c, "gold": g}) for q, c, g in QUESTIONS))
    return {
        "task": "questions", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip


def scalars(model: Any, **where: Any) -> af.ActivScalar:
    made = af.ActivScalar.for_model(model, **where)
    with torch.no_grad():
        made.alpha.normal_(generator=torch.Generator().manual_seed(2)).mul_(3)
    return made


def answers(lm: Any, folder: Path) -> list[list[float]]:
    """The log-likelihoods of all choices, question by question."""
    manager = TaskManager(include_defaults=False)  # the index of the harness's own tasks takes seconds
    found = lm_eval.simple_evaluate(lm, tasks=[task(folder)], bootstrap_iters=0, task_manager=manager)
    return [[float(choice[0]) for choice in sample["filtered_resps"]] for sample in found["samples"]["questions"]]


def on(model: Any, cls: type[HFLM] = HFLM, *args: Any, **given: Any) -> Any:
    return cls(model, *args, tokenizer=tiny.tokenizer(), batch_size=4, device="cpu", **given)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_a_task_gives_the_figures_of_the_patched_model_whatever_the_strength(tmp_path: Path) -> None:
    model = tiny.llama()
    made = scalars(model)
    plain = answers(on(model), tmp_path)
    for strength in (1.0, -1.0, 0.0):
        lm = on(model, SteeredLM, made, strength=strength)
        found = answers(lm, tmp_path)
        lm.remove()
        with af.patch(model, made, strength):
            expected = answers(on(model), tmp_path)
        assert found == expected
        assert (found == plain) is (strength == 0.0)
    assert answers(on(model), tmp_path) == plain


def test_accuracies_are_those_without_an_intervention_and_with_it(tmp_path: Path) -> None:
    model = tiny.llama()
    made = scalars(model)
    found = accuracies(model, tiny.tokenizer(), made, [task(tmp_path)], strengths=[-1.0], batch_size=4)
    plain = answers(on(model), tmp_path)  # the model is left as it was
    with af.patch(model, made, -1.0):
        steered = answers(on(model), tmp_path)
    assert steered != plain
    assert found == {"questions": (share_right(plain), share_right(steered))}


def share_right(found: list[list[float]]) -> float:
    right = [
        max(range(len(row)), key=row.__getitem__) == gold for row, (*_, gold) in zip(found, QUESTIONS, strict=True)
    ]
    return sum(right) / len(right)


def test_an_answer_is_the_sum_of_its_tokens_log_probabilities(tmp_path: Path) -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    made = scalars(model)
    lm = on(model, SteeredLM, made)
    found = answers(lm, tmp_path)
    lm.remove()
    for (question, choices, _), values in zip(QUESTIONS, found, strict=True):
        for choice, value in zip(choices, values, strict=True):
            context, whole = (tokenizer(text)["input_ids"] for text in (question, f"{question} {choice}"))
            with torch.no_grad(), af.patch(model, made):
                log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            expected = sum(float(log_p[i - 1, whole[i]]) for i in range(len(context), len(whole)))
            assert value == pytest.approx(expected, abs=2e-4)


def test_generation_tasks_run_under_positions_too() -> None:
    from lm_eval.api.instance import Instance

    model, tokenizer = tiny.llama(), tiny.tokenizer()
    made = scalars(model, positions=[-1], generated=True)
    lm = on(model, SteeredLM, made)
    prompts = ["The capital of A is", "Q what"]
    requests = [
        Instance("generate_until", {}, (prompt, {"until": ["</s>"], "max_gen_toks": 4}), i)
        for i, prompt in enumerate(prompts)
    ]
    found = lm.generate_until(requests)
    lm.remove()
    for prompt, text in zip(prompts, found, strict=True):
        with af.patch(model, made):
            ids = model.generate(**tokenizer([prompt], return_tensors="pt"), max_new_tokens=4, do_sample=False)
        expected = tokenizer.decode(ids[0, len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)
        assert text.split() == expected.split("</s>")[0].split()


@pytest.mark.parametrize("where", [{"positions": [-1]}, {"positions": [0, 1]}, {"positions": [0], "generated": True}])
def test_positions_that_a_log_likelihood_cannot_tell_are_refused(where: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.llama()
    lm = on(model, SteeredLM, scalars(model, **where))
    with pytest.raises(ValueError, match=r"got positions .* expected an intervention on every token"):
        answers(lm, tmp_path)


def test_bad_arguments_are_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    model = tiny.llama()
    with pytest.raises(ValueError, match="strength: got inf, expected a finite number"):
        on(model, SteeredLM, scalars(model), strength=float("inf"))
    with pytest.raises(FileNotFoundError, match=r"intervention\.json: not found"):
        on(model, SteeredLM, str(tmp_path))
    with pytest.raises(ValueError, match="made for another model"):
        on(model, SteeredLM, scalars(tiny.llama(layers=2)))


@pytest.mark.slow
def test_the_harness_command_line_knows_the_model_type(tmp_path: Path) -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    scalars(model).save_pretrained(tmp_path / "scalars")
    (tmp_path / "tasks").mkdir()
    lines = [f"{key}: {json.dumps(value)}" for key, value in task(tmp_path).items()]
    (tmp_path / "tasks" / "questions.yaml").write_text("\n".join(lines))
    program = (
        "import functools, runpy; from lm_eval.tasks import TaskManager as t\n"
        "t.__init__ = functools.partialmethod(t.__init__, include_defaults=False)  # their index takes half a minute\n"
        "runpy.run_module('actscale_fast.integrations.lm_eval', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [
            sys.executable, "-c", program, "run", "--model", "actscale", "--model_args",
            f"pretrained={tmp_path / 'model'},intervention={tmp_path / 'scalars'},strength=-1", "--device", "cpu",
            "--tasks", "questions", "--include_path", str(tmp_path / "tasks"), "--batch_size", "2",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "questions" in done.stdout
