"""Every system on every task and seed, with equally many steps and with equal time; baselines and the frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from statistics import fmean
from typing import Any

from ..interventions import ActivScalar, Intervention
from ..learning import attribution
from .laboratory import Laboratory
from .measuring import by_attribution, shuffled
from .systems import System, few_of, system_named
from .task_forms import Task

#: Number of prompts for the gradient of the attribution baseline.
_ATTRIBUTED = 32
#: The system whose time all systems get in the second table, and how much its number of steps may grow.
REFERENCE = "scalars"
#: The learned scalars that the baselines of a form of the task are made of: of any length, and aligned.
SCALARS = {False: REFERENCE, True: "scalars-by-position"}
_SLOWEST, _FASTEST = 0.25, 4.0


def compare(lab: Laboratory, task: Task, system: System, seed: int) -> dict[str, Any]:
    """Fit one system with the common number of steps, save it, and measure it."""
    return _fit_and_measure(lab, task, system, seed, lab.size.steps)


def in_equal_time(lab: Laboratory, task: Task, system: System, seed: int) -> dict[str, Any]:
    """Fit one system with as many steps as it can take in the time of the reference system, and measure it.

    The time per step is that of the fits with equally many steps, averaged over the seeds.
    """
    steps = steps_in_equal_time(lab, task, system)
    if steps == lab.size.steps:
        place = lab.size.seeds.index(seed)
        found: dict[str, Any] = lab.results["comparison"][task.name][system.name][place]
        return found
    return _fit_and_measure(lab, task, system, seed, steps, kind="-equal-time")


def steps_in_equal_time(lab: Laboratory, task: Task, system: System) -> int:
    """Steps of a system in the time of the reference; those of the first table where they differ by a tenth or less."""
    runs = lab.results["comparison"][task.name]
    reference, own = (fmean(run["seconds"] / run["steps"] for run in runs[name]) for name in (REFERENCE, system.name))
    ratio = min(max(reference / max(own, 1e-9), _SLOWEST), _FASTEST)
    return lab.size.steps if abs(ratio - 1) <= 0.1 else max(round(lab.size.steps * ratio), 1)


def _fit_and_measure(
    lab: Laboratory, task: Task, system: System, seed: int, steps: int, kind: str = ""
) -> dict[str, Any]:
    splits = task.examples(lab.tokenizer, lab.size, seed, aligned=system.aligned)
    intervention = lab.new(task, system, seed)
    n_active = few_of(intervention) if system.few else None
    made = lab.fitted(splits.train, intervention, lab.settings(task, system), seed, steps, n_active=n_active)
    intervention.save_pretrained(lab.kept(task, system, seed, kind))
    (test,) = lab.measured(splits.test, [intervention])
    return made | {"test": test | lab.said(splits.test, intervention)}


def frozen(lab: Laboratory, task: Task, seed: int, *, aligned: bool) -> dict[str, Any]:
    """What the frozen model generates, and the lengths of the prompts."""
    splits = task.examples(lab.tokenizer, lab.size, seed, aligned=aligned)
    prompts = [example.prompt for some in (splits.train, splits.test) for example in some]
    lengths = [len(ids) for ids in lab.tokenizer(prompts)["input_ids"]]
    return {"lengths": [min(lengths), max(lengths)]} | lab.said(splits.test, None)


def baselines(lab: Laboratory, task: Task, seed: int, *, aligned: bool) -> dict[str, Any]:
    """Scalars that are not learned: the learned values at random places, and the gradient at 0."""
    splits = task.examples(lab.tokenizer, lab.size, seed, aligned=aligned)
    learned = lab.learned(task, system_named(SCALARS[aligned]), seed)
    parts = [single for single in learned.singles if isinstance(single, ActivScalar)]
    gradients = [
        by_attribution(
            part,
            attribution(
                lab.model, lab.tokenizer, splits.train[:_ATTRIBUTED], intervention=part, knock_out=False, progress=False
            ),
        )
        for part in parts
    ]
    made = {"random": _sum([shuffled(part, seed) for part in parts]), "gradient": _sum(gradients)}
    records = lab.measured(splits.test, list(made.values()))
    return {
        name: {"test": record | lab.said(splits.test, one)}
        for (name, one), record in zip(made.items(), records, strict=True)
    }


def _sum(parts: Sequence[Intervention]) -> Intervention:
    return reduce(lambda first, second: first + second, parts)
