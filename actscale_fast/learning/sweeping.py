"""Many fits at once: they share the model's passes as row groups, each with its own state, and are kept in a folder."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import defaults
from ..interventions import ActivScalar, Intervention
from ..models import layout, patch
from . import checkpoint as checkpoints
from . import parallel
from .constants import CACHE_BYTES, SPILL_BYTES
from .encoding import EncodedExamples
from .engine import Engine, Share, extent_of
from .evaluation import evaluate_all
from .examples import Example
from .fitting import checked_location, checked_objective, fit_identity, refuse_inference_mode
from .grid import Grid, Point, chain_by_minimality, points
from .objective import Objective
from .run import Run
from .settings import FitSettings, Schedule, check_counts
from .sweep_result import (
    SweepFit,
    SweepResult,
    digest_of,
    finished,
    read_evaluation,
    write_evaluation,
    write_finished,
    write_index,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STATE = "state.safetensors"


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
        folder: where fits are kept: one folder each, and `sweep.json`.
        checkpoint_every: steps of a fit between two checkpoints in that folder.
        cache_bytes, spill_bytes, memory_bytes, capture, distributed: as `fit` takes them.
        progress: show a progress bar with the time left.

    Returns:
        SweepResult: `.fits` in the grid's order, `.pareto()`, `.table()`.

    Raises:
        TypeError, ValueError: bad arguments, examples or points, named; a damaged folder.
        RuntimeError: under torch.inference_mode().

    A fit whose terms are no longer finite stops with a warning and its `error`; the others go on.

    Example:
        >>> result = af.sweep(model, tokenizer, train, {"minimality": [0.4, 0.2, 0.1], "seed": range(3)})
        >>> result.pareto()
    """
    objective = checked_objective(objective)
    settings = FitSettings(steps, lr, batch_size, seed, schedule, betas, tolerance, patience)
    check_counts(checkpoint_every=checkpoint_every, **({} if at_once is None else {"at_once": at_once}))
    refuse_inference_mode("sweep")
    sets = _by_name("examples", examples)
    tests = None if evaluate_on is None else _by_name("evaluate_on", evaluate_on)
    if tests is not None and tests.keys() != sets.keys():
        raise ValueError(f"evaluate_on: got the sets {sorted(map(str, tests))}, expected {sorted(map(str, sets))}")
    template = ActivScalar.for_model(model) if intervention is None else intervention
    paths = checked_location(template).paths
    made = points(grid, template, objective, settings, list(sets), layout(model, paths))
    data = EncodedExamples([example for some in sets.values() for example in some], tokenizer, model, paths)
    ends = _ends(sets)
    root = None if folder is None else Path(folder)
    chains = chain_by_minimality(made) if warm_start else [[point] for point in made]
    for point in (point for chain in chains for point in chain):
        location = checked_location(point.intervention)
        if point.intervention.n_groups is not None:
            raise ValueError("grid: got a stack of interventions, expected single ones")
        patch(model, point.intervention).remove()  # refuses another model's before any work
        rows = range(*ends[point.task])
        point.identity = point.settings.to_dict() | fit_identity(model, data, point.intervention, point.objective, rows)
        point.identity["location"] = location.to_dict()
        point.identity["start"] = point.after.folder if point.after else _values(point.intervention)

    world = parallel.join(distributed)
    begun = time.perf_counter()
    engine = {
        "cache_bytes": cache_bytes,
        "spill_bytes": spill_bytes,
        "memory_bytes": memory_bytes,
        "capture": capture,
    }
    work = _Sweep(model, data, ends, root, checkpoint_every, engine)
    fits = work.run(world.part(chains), len(chains) if at_once is None else at_once, progress and world.leads)
    own = _numbered(made, fits)
    if tests is not None:
        _evaluate(model, tokenizer, tests, list(own.values()), root, progress and world.leads)
    gathered = {index: fit for some in world.gather(own) for index, fit in some.items()}
    result = SweepResult([gathered[index] for index in range(len(made))], time.perf_counter() - begun)
    if root is not None and world.leads:
        write_index(root, result)
    return result


class _Slot:
    """A place in the batch: a chain of fits that take it one after another."""

    def __init__(self, chain: Iterator[Point]) -> None:
        self.chain = chain
        self.point: Point | None = None
        self.run: Run | None = None
        self.error: str | None = None
        self.before: Intervention | None = None  # the result of the fit before in the chain


class _Sweep:
    """The loop over the fits of one process."""

    def __init__(
        self, model: PreTrainedModel, data: EncodedExamples, ends: dict[str | None, tuple[int, int]],
        root: Path | None, checkpoint_every: int, engine: dict[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.data, self.ends, self.root = model, data, ends, root
        self.checkpoint_every, self.engine = checkpoint_every, engine
        self.fits: dict[int, SweepFit] = {}  # id of a point -> its result

    def run(self, chains: Sequence[Sequence[Point]], at_once: int, progress: bool) -> dict[int, SweepFit]:
        """All fits of these chains; those that one engine can run together at a time."""
        total = sum(point.settings.steps for chain in chains for point in chain)
        together: dict[Any, list[Sequence[Point]]] = {}
        for chain in chains:
            together.setdefault(self._kind(chain[0].intervention), []).append(chain)
        with _bar(total, sum(map(len, chains)), progress) as bar:
            for same in together.values():
                self._run_together(same, min(at_once, len(same)), bar)
        return self.fits

    def _kind(self, intervention: Intervention) -> Any:
        """Interventions of one kind run in one batch: the same edit at the same positions, from the same layer on."""
        location = intervention.location
        extent = extent_of(intervention, self.data)
        return type(intervention), location.site, location.positions, location.generated, extent.first

    def _run_together(self, chains: Sequence[Sequence[Point]], n_slots: int, bar: Any) -> None:
        waiting = iter(chains)
        slots = [_Slot(iter(())) for _ in range(n_slots)]
        for slot in slots:
            self._advance(slot, waiting, bar)
        if all(slot.run is None for slot in slots):
            return
        all_points = [point for chain in chains for point in chain]
        stack = _union([point.intervention for point in all_points], n_slots)
        engine = Engine(
            self.model, self.data, stack, [point.objective for point in all_points],
            **self.engine,
        )  # fmt: skip
        with torch.enable_grad(), engine:
            try:
                while busy := [(number, slot) for number, slot in enumerate(slots) if slot.run is not None]:
                    self._step(engine, stack, busy)
                    bar.update(len(busy))
                    for _, slot in busy:
                        self._after_step(slot, waiting, bar)
            finally:  # also after Ctrl-C, and where a fit failed
                for slot in slots:
                    if slot.run is not None:
                        slot.run.save()

    def _step(self, engine: Engine, stack: Intervention, busy: list[tuple[int, _Slot]]) -> None:
        shares = []
        with torch.no_grad():
            for number, slot in busy:
                assert slot.run is not None
                place = _places(stack, slot.run.intervention)
                for name, parameter in stack.named_parameters():
                    parameter[number].zero_()
                    parameter[number, place] = slot.run.intervention.get_parameter(name).detach()
                shares.append(Share(slot.run.rows(), slot.run.objective, number))
        terms, gradients = engine.gradients(shares)
        for share, (number, slot) in enumerate(busy):
            assert slot.run is not None
            place = _places(stack, slot.run.intervention)
            try:
                slot.run.update(terms[share], [gradient[number, place] for gradient in gradients])
            except FloatingPointError as error:
                slot.error = str(error)

    def _after_step(self, slot: _Slot, waiting: Iterator[Sequence[Point]], bar: Any) -> None:
        run = slot.run
        assert run is not None
        if slot.error is not None:
            warnings.warn(f"sweep: {slot.error}; the other fits go on", stacklevel=4)
            self._finish(slot, bar, slot.error)
            for point in slot.chain:
                self.fits[id(point)] = SweepFit.of(point, point.intervention, [], f"not begun: {slot.error}")
            slot.error = None
            self._advance(slot, waiting, bar)
            return
        if run.taken % self.checkpoint_every == 0:
            run.save()
        if run.done():
            self._finish(slot, bar)
            self._advance(slot, waiting, bar)

    def _finish(self, slot: _Slot, bar: Any, error: str | None = None) -> None:
        run, point = slot.run, slot.point
        assert run is not None
        assert point is not None
        try:
            run.read(wait=True)
        except FloatingPointError as late:  # a GPU's figures arrive some steps late
            error = error or str(late)
        fit = SweepFit.of(point, run.intervention, run.history, error)
        if self.root is not None and error is None:
            run.save()
            write_finished(self.root, fit)
            (self.root / point.folder / _STATE).unlink(missing_ok=True)
        self.fits[id(point)] = fit
        slot.before, slot.run = run.intervention, None
        bar.update(point.settings.steps - run.taken)
        bar.fits_done()

    def _advance(self, slot: _Slot, waiting: Iterator[Sequence[Point]], bar: Any) -> None:
        """Give the slot its next fit that is not finished yet; `slot.run` is None where there is none."""
        while True:
            point = next(slot.chain, None)
            if point is None:
                chain = next(waiting, None)
                if chain is None:
                    return
                slot.chain, slot.before = iter(chain), None
                continue
            found = None if self.root is None else finished(self.root, point)
            if found is not None:
                self.fits[id(point)] = found
                slot.before = found.intervention
                bar.skip(point.settings.steps)
                bar.fits_done()
                continue
            if slot.before is not None:
                _copy_values(slot.before, point.intervention)
            state = None
            if self.root is not None:
                (self.root / point.folder).mkdir(parents=True, exist_ok=True)
                state = self.root / point.folder / _STATE
            slot.point = point
            slot.run = Run(
                point.intervention, point.objective, point.settings, range(*self.ends[point.task]),
                checkpoint=state, identity=point.identity, name=point.label,
            )  # fmt: skip
            slot.run.resume()
            bar.skip(slot.run.taken)
            if not slot.run.done():
                return
            self._finish(slot, bar)


def _union(interventions: Sequence[Intervention], n_groups: int) -> Intervention:
    """A stack with room for each of them, at all layers that any has."""
    first = interventions[0]
    layers = tuple(sorted({layer for one in interventions for layer in one.location.layers}))
    return type(first)(replace(first.location, layers=layers), n_groups=n_groups, device=first.device)


def _places(stack: Intervention, intervention: Intervention) -> Tensor:
    """Where the intervention's layers stand among the stack's, int64 [L]."""
    layers = intervention.location.layers
    return torch.tensor([stack.location.layers.index(layer) for layer in layers], device=stack.device)


def _copy_values(source: Intervention, target: Intervention) -> None:
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(source.get_parameter(name))


def _values(intervention: Intervention) -> str:
    """A digest of where a fit starts."""
    return checkpoints.digest([parameter.detach().double().cpu().tolist() for parameter in intervention.parameters()])


def _numbered(made: Sequence[Point], fits: dict[int, SweepFit]) -> dict[int, SweepFit]:
    """The results by their place in the grid."""
    return {index: fits[id(point)] for index, point in enumerate(made) if id(point) in fits}


def _by_name(argument: str, examples: Any) -> dict[str | None, Sequence[Example]]:
    if isinstance(examples, Mapping):
        if not examples or not all(isinstance(name, str) for name in examples):
            raise ValueError(f"{argument}: got {list(examples)!r}, expected sets of examples by name")
        return dict(examples)
    return {None: examples}


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


class _Bar:
    """tqdm over all steps, with the fits that are done; steps that were taken before do not count for the time left."""

    def __init__(self, total: int, n_fits: int, show: bool) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=total, desc="sweep", disable=not show, unit="step", dynamic_ncols=True)
        self.done, self.n_fits = 0, n_fits

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, steps: int) -> None:
        self.bar.update(steps)

    def skip(self, steps: int) -> None:
        if not self.bar.disable:
            self.bar.initial += steps
            self.bar.n += steps
            self.bar.refresh()

    def fits_done(self) -> None:
        self.done += 1
        self.bar.set_postfix_str(f"{self.done}/{self.n_fits} fits", refresh=False)


def _bar(total: int, n_fits: int, show: bool) -> _Bar:
    return _Bar(total, n_fits, show)
