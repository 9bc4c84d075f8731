"""Accuracies from results of EleutherAI's lm-evaluation-harness, which this module reads and does not import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..._checks import is_real

#: Metrics of the harness that are accuracies, the preferred one first.
_METRICS = ("acc", "acc_norm", "exact_match", "em")


def harness_accuracies(frozen: Mapping[str, Any], *steered: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """By task, the accuracy of the frozen model and the lowest one under the intervention, for `stress(accuracies=)`.

    Of a task with several accuracies, or several filters of the answers, the frozen model's results say which one
    counts; it is compared with the same one under the intervention.

    Args:
        frozen: what `lm_eval.simple_evaluate` returned, or wrote to a file, for the model as it is.
        steered: the same under the intervention; several, such as one per strength.

    Raises:
        ValueError: no results under the intervention, other tasks or metrics than in the frozen model, or a task
            without accuracy.
    """
    if not steered:
        raise ValueError("steered: got no results, expected at least one")
    before = _tasks(frozen)
    keys = {task: _accuracy_of(task, figures) for task, figures in before.items()}
    after = [_tasks(results) for results in steered]
    for one in after:
        if one.keys() != before.keys():
            raise ValueError(
                f"steered: got the tasks {', '.join(sorted(one))}, expected those of the frozen model: "
                f"{', '.join(sorted(before))}"
            )
    found = {}
    for task, key in keys.items():
        for one in after:
            if not is_real(one[task].get(key)):
                raise ValueError(
                    f"steered: the task {task!r} has no {key!r}, which the frozen model's accuracy is taken from"
                )
        found[task] = (float(before[task][key]), min(float(one[task][key]) for one in after))
    return found


def _tasks(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figures of each task, by name."""
    tasks = results.get("results") if isinstance(results, Mapping) else None
    if not isinstance(tasks, Mapping) or not tasks:
        raise ValueError("results: got no 'results', expected what lm-evaluation-harness returns or writes")
    return tasks


def _accuracy_of(task: str, figures: Mapping[str, Any]) -> str:
    """The key of a task's accuracy: the metric and its filter, such as "acc,none"."""
    for metric in _METRICS:
        for key, value in figures.items():
            if key.split(",")[0] == metric and is_real(value):
                return key
    raise ValueError(f"results: the task {task!r} has none of the metrics {', '.join(_METRICS)}")
