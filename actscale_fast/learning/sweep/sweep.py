"""Fitting an intervention for every point of a grid at once: the fits share the model's passes."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ... import defaults
from ..._checks import check_counts
from ..._locks import POLL, locked, try_lock
from ..._log import notice
from ...architectures.layout import layout
from ...architectures.model_origin import ModelOrigin, origin_of
from ...architectures.sharding import ModelProcesses
from ...interventions import ActivScalar, Intervention
from ...patching.patch import patch
from ...tasks.examples import Example
from ...tasks.loading import ExampleSource
from ...verification.ensure import ensure_verified
from ..arguments import checked_location, checked_objective, refuse_idle, refuse_inference_mode, refuse_tokenless
from ..checkpoint import check_writable_checkpoint, digest
from ..distributed import ProcessGroup, process_group
from ..encoded_examples import EncodedExamples
from ..evaluate import Evaluation, evaluate_all
from ..execution import Execution, ExecutionKeywords, with_keywords
from ..fit_settings import FitSettings, Schedule
from ..identity import examples_identity, fit_identity, model_identity
from ..objective import Objective
from ..termination import saving_on_sigterm
from .example_sets import by_name, row_ranges
from .fit_folder import LOCK, examples_digest, finished_folders, read_evaluation, write_evaluation
from .folder import INDEX, clear, close_jobs, write_index
from .grid import Grid, Point, chain_by_minimality, points as points_of
from .jobs import (
    asked,
    by_text,
    check_folders,
    check_same,
    family_of,
    is_newer,
    read_plan,
    root_lock,
    share,
    share_of,
    take_weights,
    write_plan,
)
from .loop import SweepLoop
from .result import SweepFit, SweepResult
from .shares import measure_sizes, resolve_shares

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSource | Mapping[str, ExampleSource],
    grid: Grid,
    objective: Objective | None = None,
    *,
    intervention: Intervention | None = None,
    steps: int = defaults.STEPS,
    lr: float | str = defaults.LR,
    batch_size: int = defaults.BATCH_SIZE,
    seed: int = defaults.SEED,
    schedule: Schedule = defaults.SCHEDULE,
    betas: tuple[float, float] = (0.9, 0.99),
    tolerance: float | None = None,
    patience: int = defaults.PATIENCE,
    warm_start: bool = False,
    at_once: int | None = None,
    points: str | None = None,
    evaluate_on: ExampleSource | Mapping[str, ExampleSource] | None = None,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int = defaults.CHECKPOINT_EVERY,
    execution: Execution | None = None,
    progress: bool = True,
    **keywords: Unpack[ExecutionKeywords],
) -> SweepResult:
    """Fit an intervention for every point of a grid, all at once, each to the result that `fit` alone would give it.

    The fits share the model's passes: their rows stand in one batch, each with its own group of scalars. Each fit has
    its own optimizer state, order of examples, early stop and history. With a folder, finished fits are kept and not
    repeated, even if the grid grows, and interrupted ones resume from their last checkpoint.

    Under torchrun or `accelerate launch` the processes divide the fits between them; each gets all results.

    Args:
        model, tokenizer: as for `fit`.
        examples: prompts with their two answers, as for `fit`; or several sets by name, each a task that every point is
            fitted to.
        grid: a dict of lists, of which every combination is a point; or a list of dicts; or a list of interventions,
            which are the starting points and are left unchanged. The keys are the fields of `Objective` (margin,
            faithfulness, minimality, …), the arguments below (steps, lr, batch_size, seed, …), `layers` and `task`.
            `minimality` may be a share such as "10%", as in `Objective`, and so may `lr`, as in `fit`.
        objective: the objective of all points, except for what the grid says.
        intervention: the starting point of all points, which is left unchanged; None: `ActivScalar.for_model(model)`.
        steps, lr, batch_size, seed, schedule, betas, tolerance, patience: as for `fit`, for all points, except for what
            the grid says.
        warm_start: points that differ only in `minimality` form a path: they are fitted one after another from the
            largest down, each starting from the scalars of the one before.
        at_once: number of fits in progress at the same time; None: all. Passes are bounded in any case. With 1, each
            fit has passes of its own, and the same bits whatever else is fitted, in this process or in others.
        points: "2/4": fit the second of four shares of the grid (counted from 1), for jobs that divide a grid between
            them in one folder. Fits that start from each other's results stay in one share. None: all of it.
        evaluate_on: held-out examples (by name if `examples` are) on which every result is evaluated.
        folder: where fits are kept: one folder per fit, and `sweep.json`. Without it an interrupted sweep leaves
            nothing. Ctrl-C and SIGTERM save. A file in it that was changed since is an error that names it. A fit that
            another process is working on is left to it, and read when it is finished. With `points`, the last job
            writes `sweep.json`; `gather_sweep` checks that all have finished.
        checkpoint_every: number of steps between two checkpoints of a fit in that folder.
        execution: how the passes run, as for `fit`.
        progress: show a progress bar with the time left.
        keywords: the fields of `Execution` are still accepted as keyword arguments, as before `execution` existed.

    Returns:
        SweepResult: `.fits` in the grid's order (with `points`, those of the share), `.pareto()`, `.table()`.

    Raises:
        TypeError, ValueError: bad arguments, examples or points, which are named; or a damaged folder.
        OSError: the folder cannot be written, which is found out before the model runs; the message names the path.
        RuntimeError: under torch.inference_mode(), or with distributed=True and only one process.

    A fit whose terms are no longer finite, or that cannot move because its gradient is 0, stops with a warning and has
    its `error` set; the others continue.

    Example:
        >>> result = af.sweep(model, tokenizer, train, {"minimality": [0.4, 0.2, 0.1], "seed": range(3)})
        >>> result.pareto()
    """
    objective = checked_objective(objective)
    settings = FitSettings(steps, lr, batch_size, seed, schedule, betas, tolerance, patience)
    check_counts(checkpoint_every=checkpoint_every, **({} if at_once is None else {"at_once": at_once}))
    part = share_of(points)
    if part is not None and folder is None:
        raise ValueError(f"points: got {points!r} without a folder, in which jobs put their fits together")
    execution = with_keywords(execution, keywords, "sweep")
    refuse_inference_mode("sweep")
    sets = by_name("examples", examples)
    held_out = None if evaluate_on is None else by_name("evaluate_on", evaluate_on)
    if held_out is not None and held_out.keys() != sets.keys():
        raise ValueError(f"evaluate_on: got the sets {sorted(map(str, held_out))}, expected {sorted(map(str, sets))}")
    template = intervention or _first_intervention(grid) or ActivScalar.for_model(model)
    paths = checked_location(template).paths
    made = points_of(grid, template, objective, settings, list(sets), layout(model, paths))
    data = EncodedExamples([example for some in sets.values() for example in some], tokenizer, model, paths)
    refuse_tokenless(template, data)
    ensure_verified(data.device, progress=progress)
    for some in (held_out or {}).values():
        EncodedExamples(some, tokenizer, model, paths)  # refuses a bad one before any work
    root = None if folder is None else Path(folder)
    rows_of = row_ranges(sets)
    with process_group(execution.distributed, model) as processes:
        begun = time.perf_counter()
        if root is not None:
            states = (value for point in made for value in point.intervention.parameters() for _ in range(3))
            room = {str(number): value.data for number, value in enumerate(states)}  # with Adam's moments
            check_writable_checkpoint(root / INDEX, room, processes=processes)
            if processes.is_rank_zero:
                clear(root)
        origin = origin_of(model, collective=True)
        for point in made:
            _check_point(model, origin, point, data)
        expected = {task: examples_digest(some) for task, some in (held_out or {}).items()}
        with contextlib.ExitStack() as planning:
            if part is not None:
                assert root is not None
                common = settings.to_dict() | fit_identity(template, objective) | model_identity(model, True)
                common |= {"warm_start": warm_start, "accumulate": execution.accumulate, "held_out": expected}
                common["examples"] = {task: examples_identity(data, rows) for task, rows in rows_of.items()}
                wanted = asked({name: by_text(value) for name, value in common.items()}, made)
                if processes.is_rank_zero:
                    planning.enter_context(locked(root_lock(root), f"the points of {root}"))
                plan = _agreed(processes, lambda: read_plan(root))
                if plan is not None:
                    check_same(root, plan, wanted)
                    take_weights(plan, made)
            families = [family_of(point, warm_start) for point in made]  # before shares are resolved
            resolve_shares(model, data, made, rows_of, execution)
            agreed = processes.all_gather([(point.objective, point.error) for point in made])[0]
            for point, (resolved, error) in zip(made, agreed, strict=True):  # another GPU may round otherwise
                point.objective, point.error = resolved, error
            measure_sizes(model, data, made, rows_of)
            chains = chain_by_minimality(made) if warm_start else [[point] for point in made]
            _identify(model, data, chains, rows_of, execution.accumulate, saved=root is not None)
            for point, family in zip(made, families, strict=True):
                same = [point.identity[name] for name in ("examples", "tokens") if "task" not in point.chosen]
                point.family = digest([family, point.identity.get("model"), execution.accumulate, *same])
            if part is not None and root is not None:
                if plan is not None:
                    check_folders(root, plan, wanted, made)
                if processes.is_rank_zero and is_newer(plan, wanted):
                    (root / INDEX).unlink(missing_ok=True)  # it would lack the new points
                    write_plan(root, wanted, made, expected)
        processes.refuse_different((points, [point.folder for point in made]), "points")
        if root is not None and processes.is_rank_zero:
            _say_if_none_is_kept(root, made)
        mine = chains if part is None else share(chains, part)
        own_share = mine if processes.splits_rows_alone else processes.shard(mine)
        loop = SweepLoop(model, data, rows_of, root, checkpoint_every, execution, processes.of_one_fit())
        show = progress and processes.is_rank_zero
        with saving_on_sigterm(root is not None):
            fits = loop.run(own_share, len(mine) if at_once is None else at_once, show, made)
        own = {index: fits[id(point)] for index, point in enumerate(made) if id(point) in fits}
        if held_out is not None:
            _evaluate(model, tokenizer, held_out, list(own.values()), root, expected, show, processes.model)
        if processes.n_processes > 1:
            for fit in own.values():
                fit.intervention.to("cpu")
        gathered = {index: fit for some in processes.all_gather(own) for index, fit in some.items()}
        for fit in gathered.values():
            fit.intervention.to(template.device)
        result = SweepResult([gathered[index] for index in sorted(gathered)], time.perf_counter() - begun)
        if root is not None and processes.is_rank_zero:
            if part is None:
                write_index(root, result, made[0].family, expected)
            else:
                close_jobs(root)
        return result


def _check_point(model: PreTrainedModel, origin: ModelOrigin, point: Point, data: EncodedExamples) -> None:
    """Refuse, before any work, an intervention that cannot be learned here."""
    checked_location(point.intervention)
    refuse_tokenless(point.intervention, data)
    if point.intervention.n_groups is not None:
        raise ValueError("grid: got a stack of interventions, expected single ones")
    patch(model, point.intervention).remove()  # refuses another model's
    refuse_idle(model, point.intervention)
    point.intervention.set_origin(origin)


def _identify(
    model: PreTrainedModel, data: EncodedExamples, chains: Sequence[Sequence[Point]],
    rows_of: dict[str | None, range], accumulate: int, *, saved: bool,
) -> None:  # fmt: skip
    """Set the identity that the name of each point's folder depends on."""
    of_model = model_identity(model, True) if saved else {}
    of_task = {task: examples_identity(data, rows) for task, rows in rows_of.items()}
    for point in (point for chain in chains for point in chain):
        point.identity = point.settings.to_dict() | fit_identity(point.intervention, point.objective)
        point.identity |= of_task[point.task] | of_model
        if accumulate != 1:  # as of a single fit; left out where it is 1, as in folders from before it was an option
            point.identity["accumulate"] = accumulate
        values = [parameter.detach().double().cpu().tolist() for parameter in point.intervention.parameters()]
        point.identity["start"] = point.after.folder if point.after else digest(values)


def _say_if_none_is_kept(root: Path, made: Sequence[Point]) -> None:
    """Log that the finished fits in a folder all belong to other points: the caller may have expected to find them."""
    kept = finished_folders(root)
    if kept and not kept & {point.folder for point in made}:
        notice(
            f"sweep: {root} holds {len(kept)} finished fits, such as {min(kept)}, but none of them belongs to this "
            f"grid; they are kept, and all {len(made)} points are fitted. Settings, defaults, the number that a share "
            "stands for, the examples or the model may have changed since"
        )


def _evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: dict[str | None, Sequence[Example]],
    fits: list[SweepFit], root: Path | None, expected: dict[str | None, str], progress: bool, together: ModelProcesses,
) -> None:  # fmt: skip
    """Evaluate fits; those that another job is evaluating are read when it has finished.

    The processes that hold the model together do what the first of them finds; it holds the locks for all.
    """
    for task, some in held_out.items():
        mine = [fit for fit in fits if fit.task == task and fit.error is None]
        while mine:
            with contextlib.ExitStack() as locks:
                free = []
                for fit in mine:
                    if root is not None:
                        is_free, fit.evaluation = together.from_leader(
                            functools.partial(_claim_evaluation, root, fit, expected[task], locks)
                        )
                        if not is_free:
                            continue
                    if fit.evaluation is None:
                        free.append(fit)
                if free:
                    found = evaluate_all(model, tokenizer, some, [fit.intervention for fit in free], progress=progress)
                    for fit, evaluation in zip(free, found, strict=True):
                        fit.evaluation = evaluation
                        if root is not None and together.leads:
                            write_evaluation(root, fit, expected[task])
            mine = [fit for fit in mine if fit.evaluation is None]
            if mine and not free:
                time.sleep(POLL)


def _claim_evaluation(
    root: Path, fit: SweepFit, examples: str, locks: contextlib.ExitStack
) -> tuple[bool, Evaluation | None]:
    """(whether this job may evaluate a fit, the evaluation that is there); the lock is kept until `locks` ends."""
    lock = try_lock(root / fit.folder / LOCK)
    if lock is None:
        return False, None
    locks.callback(lock.release)
    return True, read_evaluation(root, fit, examples)


def _agreed(processes: ProcessGroup, read: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """What rank 0 reads, or the error that it meets, in all processes."""
    plan: dict[str, Any] | None = None
    error: Exception | None = None
    if processes.is_rank_zero:
        try:
            plan = read()
        except (ValueError, OSError) as found:
            error = found
    plan, error = processes.all_gather((plan, error))[0]
    if error is not None:
        raise error
    return plan


def _first_intervention(grid: Any) -> Intervention | None:
    """The first starting point of a list of interventions."""
    first = grid[0] if isinstance(grid, Sequence) and not isinstance(grid, str) and grid else None
    return first if isinstance(first, Intervention) else None
