"""Every method that chooses heads, at equal numbers of heads, on the same held-out prompts."""

from __future__ import annotations

import warnings
from typing import Any

from ..interventions import ActivScalar
from ..learning import compare_heads
from ..learning.head_selection.methods import METHODS
from .laboratory import Laboratory
from .task_forms import Task

#: Figures that are kept of each row, with their intervals over the prompts.
FIGURES = ("flip_to_correct", "flip_to_wrong", "top_correct", "top_wrong", "kl")


def compared(lab: Laboratory, task: Task, methods: tuple[str, ...]) -> dict[str, Any]:
    """Some methods that share their scores: heads on training prompts, strengths on validation, figures on test.

    Methods that the model or the task does not allow are left out, with the reason.
    """
    size, seed = lab.size, lab.size.seeds[0]
    splits = task.examples(lab.tokenizer, size, seed)
    n_heads = ActivScalar.for_model(lab.model).n_parameters
    counts = [count for count in size.head_counts if count <= n_heads]
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of fewer heads than asked for: the rows say how many there are
        for name in methods:
            options = _options(lab, name)
            try:
                found = compare_heads(
                    lab.model, lab.tokenizer, splits.train[: size.n_scored], splits.test, [name], k=counts, seed=seed,
                    validation=splits.validation, options={name: options} if options else None, progress=False,
                    strengths=None if METHODS[name].is_fitted else size.head_strengths,
                )  # fmt: skip
            except ValueError as error:
                left_out[name] = " ".join(str(error).split())
                continue
            rows += [_row(name, count, one) for count, one in zip(counts, found.results, strict=True)]
    return {"rows": rows, "left_out": left_out}


def _options(lab: Laboratory, name: str) -> dict[str, Any]:
    """The fits of a method take the number of steps of this size."""
    method = METHODS[name]
    known = method.score_options | method.refit_options
    wanted = {"steps": lab.size.head_steps, "fit_batch_size": lab.size.batch_size}
    return {option: value for option, value in wanted.items() if option in known}


def _row(name: str, count: int, one: Any) -> dict[str, Any]:
    evaluation, selection = one.evaluation, one.selection
    figures = {key: [round(getattr(evaluation, key), 4), *_ends(evaluation, key)] for key in FIGURES}
    heads = [[head.layer, head.head, round(head.score, 5), round(head.alpha, 4)] for head in selection.heads]
    return {
        "method": name, "k": count, "n_heads": selection.k, "strength": selection.strength, "seconds": one.seconds,
        "heads": heads, **figures,
    }  # fmt: skip


def _ends(evaluation: Any, key: str) -> list[float]:
    value = getattr(evaluation, key)
    return [round(end, 4) for end in evaluation.intervals.get(key, (value, value))]
