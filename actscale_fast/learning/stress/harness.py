"""Accuracies from results of EleutherAI's lm-evaluation-harness, which this module reads and does not import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..._checks import is_real

#: Metrics of the harness that are accuracies, the preferred one first.
_METRICS = ("acc", "acc_norm", "exact_match", "em")


def harness_accuracies(frozen: Mapping[str, Any], *steered: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """By task, the accuracy of the frozen model and the lowest one under the intervention, for `stress(accuracies=)`.

    Args:
        frozen: what `lm_eval.simple_evaluate` returned, or wrote to a file, for the model as it is.
        steered: the same under the intervention; several, such as one per strength.

    Raises:
        ValueError: no results under the intervention, other tasks than in the frozen model, or a task without accuracy.
    """
    if not steered:
        raise ValueError("steered: got no results, expected at least one")
    before, *after = (_accuracies(results) for results in (frozen, *steered))
    for one in after:
        if one.keys() != before.keys():
            raise ValueError(
                f"steered: got the tasks {', '.join(sorted(one))}, expected those of the frozen model: "
                f"{', '.join(sorted(before))}"
            )
    return {name: (value, min(one[name] for one in after)) for name, value in before.items()}


def _accuracies(results: Mapping[str, Any]) -> dict[str, float]:
    tasks = results.get("results") if isinstance(results, Mapping) else None
    if not isinstance(tasks, Mapping) or not tasks:
        raise ValueError("results: got no 'results', expected what lm-evaluation-harness returns or writes")
    found = {}
    for task, figures in tasks.items():
        for metric in _METRICS:
            values = [value for key, value in figures.items() if key.split(",")[0] == metric and is_real(value)]
            if values:
                found[task] = float(values[0])
                break
        else:
            raise ValueError(f"results: the task {task!r} has none of the metrics {', '.join(_METRICS)}")
    return found
