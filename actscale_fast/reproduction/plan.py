"""The stages of a run in the order of their dependencies, and what each of them costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import comparing, heads, locating, recipes, remedies, stressing, transferring, tuning
from .claims import judged
from .laboratory import Laboratory
from .systems import SYSTEMS, System, system_named
from .task_forms import FORMS, N_BEFORE, TASKS, Task

#: Passes of the model per prompt and step of a fit: two directions, forward and back.
_FIT = 6
#: A choice of scalars by a path of fits, beside the last fit.
_PATH = 3.5
#: Passes per prompt whose two answers are generated, as a multiple of one forward pass.
_GENERATED = 6


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the run whose result is a file."""

    where: tuple[str, ...]  # its place in the results
    compute: Callable[[], Any]
    cost: float  # in forward passes of one prompt, roughly

    @property
    def name(self) -> str:
        """The name of its file."""
        return "-".join(part.replace(" ", "-") for part in self.where)


def stages(lab: Laboratory) -> Iterator[Stage]:
    """Every stage but the remedies, which depend on their results."""
    for task in TASKS:
        yield from _tuning(lab, task)
    for seed in lab.size.seeds:
        for task in TASKS:
            yield from _of_seed(lab, task, seed)
    for task in TASKS:
        yield from _of_task(lab, task)
    for name in ("act-add", "mean-centring", "instruction", "latent"):
        recipe = getattr(recipes, name.replace("-", "_"))
        cost = 12 * lab.size.max_new_tokens
        yield Stage(("recipes", name), partial(recipes.attempted, recipe, lab), cost)
    for task in TASKS:
        for system in SYSTEMS:
            for seed in lab.size.seeds[: lab.size.time_seeds]:
                where = ("equal-time", task.name, system.name, str(seed))
                compute = partial(comparing.in_equal_time, lab, task, system, seed)
                yield Stage(where, compute, _fit_cost(lab, system, lab.size.steps))


def remedy_stages(lab: Laboratory) -> Iterator[Stage]:
    """What is tried for the claims that are not held or not decided."""
    if not lab.size.remedy_seeds:
        return
    open_claims = [
        claim
        for claim in judged(lab.results, [task.name for task in TASKS])
        if claim.verdict in ("not held", "not decided")
    ]
    for task in TASKS:
        for kind in dict.fromkeys(claim.kind for claim in open_claims if claim.kind and claim.task == task.name):
            for number, (_, name, factor, active) in enumerate(remedies.REMEDIES[kind]):
                compute = partial(remedies.attempted, lab, task, kind, number)
                cost = lab.size.steps * factor * lab.size.batch_size * _FIT * (_PATH if active else 1)
                yield Stage(("remedies", task.name, kind, f"{number}-{name}"), compute, cost * lab.size.remedy_seeds)


def _tuning(lab: Laboratory, task: Task) -> Iterator[Stage]:
    for system in SYSTEMS:
        if not system.tuned_as:
            for number in range(len(lab.size.grid)):
                compute = partial(tuning.tried, lab, task, system, number)
                cost = lab.size.tuning_steps * lab.size.batch_size * _FIT + 3 * lab.size.n_validation
                yield Stage(("tuning", task.name, system.name, str(number)), compute, cost)


def _of_seed(lab: Laboratory, task: Task, seed: int) -> Iterator[Stage]:
    for aligned in (False, True):
        where = ("frozen", task.name, FORMS[aligned], str(seed))
        compute = partial(comparing.frozen, lab, task, seed, aligned=aligned)
        yield Stage(where, compute, _GENERATED * lab.size.n_generated)
    for system in SYSTEMS:
        where = ("comparison", task.name, system.name, str(seed))
        compute = partial(comparing.compare, lab, task, system, seed)
        yield Stage(where, compute, _fit_cost(lab, system, lab.size.steps))
    cost = 5 * lab.size.n_test + 2 * _GENERATED * lab.size.n_generated + 100
    for aligned in (False, True):
        where = ("baselines", task.name, FORMS[aligned], str(seed))
        yield Stage(where, partial(comparing.baselines, lab, task, seed, aligned=aligned), cost)


def _of_task(lab: Laboratory, task: Task) -> Iterator[Stage]:
    size, scalars = lab.size, system_named("scalars")
    n_transferred = 9 * size.n_transferred * size.transfer_seeds
    for number in N_BEFORE:
        compute = partial(transferring.to_length, lab, task, number)
        yield Stage(("transfer", task.name, "lengths", str(number)), compute, (1 + number) * n_transferred)
    for wording in task.wordings:
        compute = partial(transferring.to_wording, lab, task, wording)
        yield Stage(("transfer", task.name, "wordings", wording), compute, n_transferred)
    yield Stage(
        ("path", task.name), partial(locating.path, lab, task, scalars),
        size.n_path * (size.path_steps * size.batch_size * _FIT + 2 * size.n_test),
    )  # fmt: skip
    for name in size.stressed:
        compute = partial(stressing.stressed, lab, task, name)
        yield Stage(("stress", task.name, name), compute, 100 * size.n_stressed + 600)
    yield Stage(("knock-out", task.name), partial(locating.knock_out, lab, task, scalars), 300 * size.n_attributed)
    for group in size.methods:
        rows = len(group) * len(size.head_counts)
        cost = rows * 2 * (size.n_validation * len(size.head_strengths) + size.n_test)
        if any(name.endswith(("refit", "scalar")) for name in group):
            cost += len(size.head_counts) * size.head_steps * size.batch_size * _FIT
        yield Stage(("heads", task.name, group[0]), partial(heads.compared, lab, task, group), cost)


def _fit_cost(lab: Laboratory, system: System, steps: int) -> float:
    size = lab.size
    fit = steps * size.batch_size * _FIT * (_PATH if system.few else 1)
    return fit + size.n_train + 3 * size.n_test + _GENERATED * size.n_generated


#: Results with one entry per seed, or per point of a grid, in their order.
_LISTS = ("comparison", "equal-time", "baselines", "frozen")


def put(results: dict[str, Any], where: tuple[str, ...], result: Any) -> None:
    """Store a result at its place; the results of several seeds, and of a grid, form a list."""
    if where[0] == "tuning":
        of_system = results.setdefault("tuning", {}).setdefault(where[1], {}).setdefault(where[2], {})
        of_system.setdefault("points", []).append(result)
        of_system["chosen"] = tuning.chosen(of_system["points"])
        return
    *keys, last = where[:-1] if where[0] in _LISTS else where
    for key in keys:
        results = results.setdefault(key, {})
    if where[0] in _LISTS:
        results.setdefault(last, []).append(result)
    else:
        results[last] = result
