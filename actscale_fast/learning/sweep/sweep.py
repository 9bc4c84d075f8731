"""Many fits at once: they share the model's passes as row groups, each with its own state, and are kept in a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import defaults
from ..._checks import check_bytes, check_counts
from ...architectures.layout import layout
from ...interventions import ActivScalar, Intervention
from ...patching.patch import patch
from ...tasks.examples import Example, check_examples
from .. import checkpoint as checkpoints, distributed as parallel
from ..encoded_examples import EncodedExamples
from ..engine import CACHE_BYTES, SPILL_BYTES
from ..evaluate import evaluate_all
from ..fit import (
    checked_location,
    checked_objective,
    examples_identity,
    fit_identity,
    model_identity,
    refuse_idle,
    refuse_inference_mode,
)
from ..fit_settings import FitSettings, Schedule
from ..objective import Objective
from ..termination import saving_on_sigterm
from .folder import INDEX, digest_of, read_evaluation, write_evaluation, write_index
from .grid import Grid, Point, chain_by_minimality, points
from .loop import SweepLoop
from .result import SweepFit, SweepResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example] | Mapping[str, Sequence[Example]],
    grid: Grid,
    objective: Objective | None = None,
    *,
    intervention: Intervention | None = None,
    steps: int = defaults.STEPS,
    lr: float = defaults.LR,
    batch_size: int = defaults.BATCH_SIZE,
    seed: int = defaults.SEED,
    schedule: Schedule = defaults.SCHEDULE,
    betas: tuple[float, float] = (0.9, 0.99),
    tolerance: float | None = None,
    patience: int = defaults.PATIENCE,
    warm_start: bool = False,
    at_once: int | None = None,
    evaluate_on: Sequence[Example] | Mapping[str, Sequence[Example]] | None = None,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int = defaults.CHECKPOINT_EVERY,
    cache_bytes: int = CACHE_BYTES,
    spill_bytes: int = SPILL_BYTES,
    memory_bytes: int | None = None,
    capture: bool = False,
    distributed: bool | None = None,
    progress: bool = True,
) -> SweepResult:
    """Fit an intervention for every point of a grid, all at once, each to the result that `fit` alone would give it.

    The fits share the passes of the model: their rows stand in one batch, each with its own group of scalars. Each has
    its own optimizer state, order of examples, early stop and history. With a folder, finished fits are kept and not
    repeated, also when the grid grows, and interrupted ones go on from their last checkpoint.

    Under torchrun or `accelerate launch` the processes split the fits; each gets all results.

    Args:
        model, tokenizer: as `fit` takes them.
        examples: prompts with their two answers; or several sets by name, each a task that every point is fitted to.
        grid: a dict of lists, whose every combination is a point; or a list of dicts; or a list of interventions, which
            are the starting points and are left as they are. The keys are those of `Objective` (margin, faithfulness,
            minimality, …), of the arguments below (steps, lr, batch_size, seed, …), `layers` and `task`.
        objective: of all points, but for what the grid says.
        intervention: what points start from; default `ActivScalar.for_model(model)`. It is left as it is.
        steps, lr, batch_size, seed, schedule, betas, tolerance, patience: as `fit` takes them, for all points, but for
            what the grid says.
        warm_start: points that differ in `minimality` alone are a path: fitted one after another from the largest down,
            each from the scalars of the one before.
        at_once: fits under way at the same time; None: all. Passes are bounded in any case.
        evaluate_on: held-out examples (by name where `examples` are) that every result is evaluated on.
        folder: where fits are kept: one folder each, and `sweep.json`. Without one an interrupted sweep leaves nothing.
            Ctrl-C and SIGTERM save. A file in it that was changed since is an error that names it.
        checkpoint_every: steps of a fit between two checkpoints in that folder.
        cache_bytes, spill_bytes, memory_bytes, capture, distributed: as `fit` takes them.
        progress: show a progress bar with the time left.

    Returns:
        SweepResult: `.fits` in the grid's order, `.pareto()`, `.table()`.

    Raises:
        TypeError, ValueError: bad arguments, examples or points, named; a damaged folder.
        OSError: the folder cannot be written, found out before the model runs; names the path.
        RuntimeError: under torch.inference_mode(); distributed=True of one process.

    A fit whose terms are no longer finite stops with a warning and its `error`; the others go on.

    Example:
        >>> result = af.sweep(model, tokenizer, train, {"minimality": [0.4, 0.2, 0.1], "seed": range(3)})
        >>> result.pareto()
    """
    objective = checked_objective(objective)
    settings = FitSettings(steps, lr, batch_size, seed, schedule, betas, tolerance, patience)
    check_counts(checkpoint_every=checkpoint_every, **({} if at_once is None else {"at_once": at_once}))
    check_bytes(cache_bytes=cache_bytes, spill_bytes=spill_bytes, memory_bytes=memory_bytes)
    refuse_inference_mode("sweep")
    sets = _by_name("examples", examples)
    tests = None if evaluate_on is None else _by_name("evaluate_on", evaluate_on)
    if tests is not None and tests.keys() != sets.keys():
        raise ValueError(f"evaluate_on: got the sets {sorted(map(str, tests))}, expected {sorted(map(str, sets))}")
    template = intervention or _first_intervention(grid) or ActivScalar.for_model(model)
    paths = checked_location(template).paths
    made = points(grid, template, objective, settings, list(sets), layout(model, paths))
    data = EncodedExamples([example for some in sets.values() for example in some], tokenizer, model, paths)
    for held_out in (tests or {}).values():
        EncodedExamples(held_out, tokenizer, model, paths)  # refuses a bad one before any work
    ends = _ends(sets)
    world = parallel.join(distributed)
    root = None if folder is None else Path(folder)
    if root is not None:
        checkpoints.check_place(root / INDEX, world=world)
    chains = chain_by_minimality(made) if warm_start else [[point] for point in made]
    of_model = {} if root is None else model_identity(model, True)
    of_task = {task: examples_identity(data, range(*rows)) for task, rows in ends.items()}
    for point in (point for chain in chains for point in chain):
        checked_location(point.intervention)
        if point.intervention.n_groups is not None:
            raise ValueError("grid: got a stack of interventions, expected single ones")
        patch(model, point.intervention).remove()  # refuses another model's before any work
        refuse_idle(model, point.intervention)
        point.identity = point.settings.to_dict() | fit_identity(point.intervention, point.objective)
        point.identity |= of_task[point.task] | of_model
        point.identity["start"] = point.after.folder if point.after else _values(point.intervention)

    begun = time.perf_counter()
    engine = {
        "cache_bytes": cache_bytes,
        "spill_bytes": spill_bytes,
        "memory_bytes": memory_bytes,
        "capture": capture,
    }
    work = SweepLoop(model, data, ends, root, checkpoint_every, engine)
    with saving_on_sigterm(root is not None):
        fits = work.run(world.part(chains), len(chains) if at_once is None else at_once, progress and world.leads)
    own = _numbered(made, fits)
    if tests is not None:
        _evaluate(model, tokenizer, tests, list(own.values()), root, progress and world.leads)
    if world.size > 1:
        for fit in own.values():
            fit.intervention.to("cpu")
    gathered = {index: fit for some in world.gather(own) for index, fit in some.items()}
    for fit in gathered.values():
        fit.intervention.to(template.device)
    result = SweepResult([gathered[index] for index in range(len(made))], time.perf_counter() - begun)
    if root is not None and world.leads:
        write_index(root, result)
    return result


def _numbered(made: Sequence[Point], fits: dict[int, SweepFit]) -> dict[int, SweepFit]:
    """The results by their place in the grid."""
    return {index: fits[id(point)] for index, point in enumerate(made) if id(point) in fits}


def _by_name(argument: str, examples: Any) -> dict[str | None, Sequence[Example]]:
    sets = examples if isinstance(examples, Mapping) else {None: examples}
    if isinstance(examples, Mapping) and not (examples and all(isinstance(name, str) for name in examples)):
        raise ValueError(f"{argument}: got {list(examples)!r}, expected sets of examples by name")
    checked: dict[str | None, Sequence[Example]] = {}
    for name, some in sets.items():
        if not isinstance(some, Iterable):
            raise TypeError(f"{argument}: got {type(some).__name__}, expected examples")
        try:
            checked[name] = check_examples(list(some))
        except (TypeError, ValueError) as error:
            where = argument if name is None else f"{argument}[{name!r}]"
            raise type(error)(str(error).replace("examples", where, 1)) from None
    return checked


def _ends(sets: dict[str | None, Sequence[Example]]) -> dict[str | None, tuple[int, int]]:
    """First row and the one after the last of each set."""
    ends, start = {}, 0
    for name, some in sets.items():
        ends[name] = (start, start + len(some))
        start += len(some)
    return ends


def _evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tests: dict[str | None, Sequence[Example]],
    fits: list[SweepFit], root: Path | None, progress: bool,
) -> None:  # fmt: skip
    for task, held_out in tests.items():
        mine = [fit for fit in fits if fit.task == task and fit.error is None]
        digest = digest_of(held_out)
        if root is not None:
            for fit in mine:
                fit.evaluation = read_evaluation(root, fit, digest)
        mine = [fit for fit in mine if fit.evaluation is None]
        if not mine:
            continue
        found = evaluate_all(model, tokenizer, held_out, [fit.intervention for fit in mine], progress=progress)
        for fit, evaluation in zip(mine, found, strict=True):
            fit.evaluation = evaluation
            if root is not None:
                write_evaluation(root, fit, digest)


def _first_intervention(grid: Any) -> Intervention | None:
    """The first starting point of a list of interventions."""
    first = grid[0] if isinstance(grid, Sequence) and not isinstance(grid, str) and grid else None
    return first if isinstance(first, Intervention) else None


def _values(intervention: Intervention) -> str:
    """A digest of where a fit starts."""
    return checkpoints.digest([parameter.detach().double().cpu().tolist() for parameter in intervention.parameters()])
