"""Fitting an intervention for every point of a grid at once: the fits share the model's passes."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ... import defaults
from ..._checks import check_counts
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
from ..distributed import process_group
from ..encoded_examples import EncodedExamples
from ..evaluate import evaluate_all
from ..execution import Execution, ExecutionKeywords, with_keywords
from ..fit_settings import FitSettings, Schedule
from ..identity import examples_identity, fit_identity, model_identity
from ..objective import Objective
from ..termination import saving_on_sigterm
from .example_sets import by_name, row_ranges
from .fit_folder import examples_digest, finished_folders, read_evaluation, write_evaluation
from .folder import INDEX, write_index
from .grid import Grid, Point, chain_by_minimality, points
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
        at_once: number of fits in progress at the same time; None: all. Passes are bounded in any case.
        evaluate_on: held-out examples (by name if `examples` are) on which every result is evaluated.
        folder: where fits are kept: one folder per fit, and `sweep.json`. Without it an interrupted sweep leaves
            nothing. Ctrl-C and SIGTERM save. A file in it that was changed since is an error that names it.
        checkpoint_every: number of steps between two checkpoints of a fit in that folder.
        execution: how the passes run, as for `fit`.
        progress: show a progress bar with the time left.
        keywords: the fields of `Execution` are still accepted as keyword arguments, as before `execution` existed.

    Returns:
        SweepResult: `.fits` in the grid's order, `.pareto()`, `.table()`.

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
    execution = with_keywords(execution, keywords, "sweep")
    refuse_inference_mode("sweep")
    sets = by_name("examples", examples)
    held_out = None if evaluate_on is None else by_name("evaluate_on", evaluate_on)
    if held_out is not None and held_out.keys() != sets.keys():
        raise ValueError(f"evaluate_on: got the sets {sorted(map(str, held_out))}, expected {sorted(map(str, sets))}")
    template = intervention or _first_intervention(grid) or ActivScalar.for_model(model)
    paths = checked_location(template).paths
    made = points(grid, template, objective, settings, list(sets), layout(model, paths))
    data = EncodedExamples([example for some in sets.values() for example in some], tokenizer, model, paths)
    refuse_tokenless(template, data)
    ensure_verified(data.device, progress=progress)
    for some in (held_out or {}).values():
        EncodedExamples(some, tokenizer, model, paths)  # refuses a bad one before any work
    root = None if folder is None else Path(folder)
    rows_of = row_ranges(sets)
    with process_group(execution.distributed, model) as processes:
        if root is not None:
            check_writable_checkpoint(root / INDEX, processes=processes)
        origin = origin_of(model)
        for point in made:
            _check_point(model, origin, point, data)
        resolve_shares(model, data, made, rows_of, execution)
        measure_sizes(model, data, made, rows_of)
        chains = chain_by_minimality(made) if warm_start else [[point] for point in made]
        _identify(model, data, chains, rows_of, execution.accumulate, saved=root is not None)
        if root is not None and processes.is_rank_zero:
            _say_if_none_is_kept(root, made)
        begun = time.perf_counter()
        loop = SweepLoop(model, data, rows_of, root, checkpoint_every, execution, processes.of_one_fit())
        show = progress and processes.is_rank_zero
        with saving_on_sigterm(root is not None):
            mine = chains if processes.splits_rows_alone else processes.shard(chains)
            fits = loop.run(mine, len(chains) if at_once is None else at_once, show)
        own = {index: fits[id(point)] for index, point in enumerate(made) if id(point) in fits}
        if held_out is not None:
            _evaluate(model, tokenizer, held_out, list(own.values()), root, show, processes.model)
        if processes.n_processes > 1:
            for fit in own.values():
                fit.intervention.to("cpu")
        gathered = {index: fit for some in processes.all_gather(own) for index, fit in some.items()}
        for fit in gathered.values():
            fit.intervention.to(template.device)
        result = SweepResult([gathered[index] for index in range(len(made))], time.perf_counter() - begun)
        if root is not None and processes.is_rank_zero:
            write_index(root, result)
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
    fits: list[SweepFit], root: Path | None, progress: bool, together: ModelProcesses,
) -> None:  # fmt: skip
    for task, some in held_out.items():
        mine = [fit for fit in fits if fit.task == task and fit.error is None]
        expected = examples_digest(some)
        if root is not None:
            for fit in mine:
                fit.evaluation = together.from_leader(functools.partial(read_evaluation, root, fit, expected))
        mine = [fit for fit in mine if fit.evaluation is None]
        if not mine:
            continue
        found = evaluate_all(model, tokenizer, some, [fit.intervention for fit in mine], progress=progress)
        for fit, evaluation in zip(mine, found, strict=True):
            fit.evaluation = evaluation
            if root is not None and together.leads:
                write_evaluation(root, fit, expected)


def _first_intervention(grid: Any) -> Intervention | None:
    """The first starting point of a list of interventions."""
    first = grid[0] if isinstance(grid, Sequence) and not isinstance(grid, str) and grid else None
    return first if isinstance(first, Intervention) else None
