"""The loop of a sweep: all fits in progress take a step together, each with its own state."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ...interventions import Intervention
from ..distributed import SINGLE_PROCESS, ProcessGroup
from ..encoded_examples import EncodedExamples
from ..engine import Engine, FitRequest, active_region
from ..execution import Execution
from ..fit_state import FitState
from ..zero_gradient import ZeroGradientError, ZeroGradientWatch
from .fit_folder import finished, write_finished
from .grid import Point
from .result import SweepFit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STATE = "state.safetensors"


class _Slot:
    """A row group of the batch, which the fits of a chain use one after another."""

    def __init__(self, chain: Iterator[Point]) -> None:
        self.chain = chain
        self.point: Point | None = None
        self.state: FitState | None = None
        self.watch: ZeroGradientWatch | None = None
        self.error: str | None = None
        self.before: Intervention | None = None  # the result of the previous fit in the chain


class SweepLoop:
    """The loop over the fits of one process."""

    def __init__(
        self, model: PreTrainedModel, data: EncodedExamples, rows_of: dict[str | None, range], root: Path | None,
        checkpoint_every: int, execution: Execution, processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:  # fmt: skip
        self.model, self.data, self.rows_of, self.root = model, data, rows_of, root
        self.checkpoint_every, self.execution, self.processes = checkpoint_every, execution, processes
        self.fits: dict[int, SweepFit] = {}  # the result of each point, by the point's id

    def run(self, chains: Sequence[Sequence[Point]], at_once: int, progress: bool) -> dict[int, SweepFit]:
        """Run all fits of these chains; those that can share one engine run together."""
        total = sum(point.settings.steps for chain in chains for point in chain)
        together: dict[Any, list[Sequence[Point]]] = {}
        for chain in chains:
            together.setdefault(self._kind(chain[0].intervention), []).append(chain)
        with _Bar(total, sum(map(len, chains)), progress) as bar:
            for same in together.values():
                self._run_together(same, min(at_once, len(same)), bar)
        return self.fits

    def _kind(self, intervention: Intervention) -> Any:
        """What interventions must have in common to run in one batch."""
        location = intervention.location
        first = active_region(intervention, self.data).first_layer
        return type(intervention), location.site, location.positions, location.generated, first

    def _run_together(self, chains: Sequence[Sequence[Point]], n_slots: int, bar: Any) -> None:
        waiting = iter(chains)
        slots = [_Slot(iter(())) for _ in range(n_slots)]
        for slot in slots:
            self._advance(slot, waiting, bar)
        if all(slot.state is None for slot in slots):
            return
        all_points = [point for chain in chains for point in chain]
        stack = _union([point.intervention for point in all_points], n_slots)
        engine = Engine(
            self.model, self.data, stack, [point.objective for point in all_points], self.execution, self.processes
        )
        with torch.enable_grad(), engine:
            try:
                while busy := [(number, slot) for number, slot in enumerate(slots) if slot.state is not None]:
                    self._step(engine, stack, busy)
                    bar.update(len(busy))
                    for _, slot in busy:
                        self._after_step(slot, waiting, bar)
            finally:  # also after Ctrl-C, and where a fit failed
                for slot in slots:
                    if slot.state is not None:
                        with contextlib.suppress(FloatingPointError):  # this fit keeps its last checkpoint
                            slot.state.save()

    def _step(self, engine: Engine, stack: Intervention, busy: list[tuple[int, _Slot]]) -> None:
        requests, places = [], []
        with torch.no_grad():
            for number, slot in busy:
                assert slot.state is not None
                places.append(_places(stack, slot.state.intervention))
                for name, parameter in stack.named_parameters():
                    parameter[number].zero_()
                    parameter[number, places[-1]] = slot.state.intervention.get_parameter(name).detach()
                requests.append(FitRequest(slot.state.rows(), slot.state.objective, number))
        terms, gradients = engine.gradients(requests)
        for (number, slot), place, request, own_terms in zip(busy, places, requests, terms, strict=True):
            assert slot.state is not None
            assert slot.watch is not None
            own = [gradient[number, place] for gradient in gradients]
            try:
                slot.watch.look(request.rows, own_terms, own)
                slot.state.update(own_terms, own)
            except (FloatingPointError, ZeroGradientError) as error:
                slot.error = str(error)

    def _after_step(self, slot: _Slot, waiting: Iterator[Sequence[Point]], bar: Any) -> None:
        state = slot.state
        assert state is not None
        try:  # a GPU's figures arrive some steps late
            if state.taken % self.checkpoint_every == 0:
                state.save()
            if state.done():
                state.read(wait=True)
        except FloatingPointError as error:
            slot.error = slot.error or str(error)
        if slot.error is not None:
            warnings.warn(f"sweep: {slot.error}; the other fits continue", stacklevel=4)
            self._finish(slot, bar, slot.error)
            for point in slot.chain:
                self.fits[id(point)] = SweepFit.of(point, point.intervention, [], f"not begun: {slot.error}")
            slot.error = None
            self._advance(slot, waiting, bar)
            return
        if state.done():
            self._finish(slot, bar)
            self._advance(slot, waiting, bar)

    def _finish(self, slot: _Slot, bar: Any, error: str | None = None) -> None:
        state, point = slot.state, slot.point
        assert state is not None
        assert point is not None
        fit = SweepFit.of(point, state.intervention, state.history, error)
        if self.root is not None and error is None:
            state.save()
            if self.processes.is_rank_zero:
                write_finished(self.root, fit)
                self._state_file(point).unlink(missing_ok=True)
        self.fits[id(point)] = fit
        slot.before, slot.state = state.intervention, None
        bar.update(point.settings.steps - state.taken)
        bar.fits_done()

    def _advance(self, slot: _Slot, waiting: Iterator[Sequence[Point]], bar: Any) -> None:
        """Give the slot its next unfinished fit; `slot.state` stays None if there is none."""
        while (point := self._next_point(slot, waiting)) is not None:
            if point.error is not None:
                warnings.warn(f"sweep: {point.error}; the other fits continue", stacklevel=5)
                self.fits[id(point)] = SweepFit.of(point, point.intervention, [], point.error)
                bar.update(point.settings.steps)
                bar.fits_done()
                continue
            found = self._finished(point)
            if found is not None:
                self.fits[id(point)] = found
                slot.before = found.intervention
                if self.processes.is_rank_zero:
                    self._state_file(point).unlink(missing_ok=True)  # of a killed process
                bar.skip(point.settings.steps)
                bar.fits_done()
                continue
            self._begin(slot, point)
            assert slot.state is not None
            bar.skip(slot.state.taken)
            if not slot.state.done():
                return
            self._finish(slot, bar)

    def _finished(self, point: Point) -> SweepFit | None:
        """The finished fit of a point in the folder, as the process sees it that writes there."""
        root = self.root
        return None if root is None else self.processes.model.from_leader(lambda: finished(root, point))

    def _next_point(self, slot: _Slot, waiting: Iterator[Sequence[Point]]) -> Point | None:
        """The next point of the slot's chain, or else of the next chain that is waiting."""
        while (point := next(slot.chain, None)) is None:
            chain = next(waiting, None)
            if chain is None:
                return None
            slot.chain, slot.before = iter(chain), None
        return point

    def _begin(self, slot: _Slot, point: Point) -> None:
        """Start the fit of a point, or resume it from its checkpoint."""
        if slot.before is not None:
            _copy_values(slot.before, point.intervention)
        path = None
        if self.root is not None:
            path = self._state_file(point)
            if self.processes.is_rank_zero:
                path.parent.mkdir(parents=True, exist_ok=True)
        slot.point = point
        slot.state = FitState(
            point.intervention, point.objective, point.settings, self.rows_of[point.task],
            checkpoint=path, identity=point.identity, name=point.label,
        )  # fmt: skip
        slot.state.resume(self.processes)
        if not slot.state.full_steps.are_known:
            slot.state.full_steps.set_sizes(point.sizes)
        slot.watch = ZeroGradientWatch(self.model, self.data, slot.state)

    def _state_file(self, point: Point) -> Path:
        """The checkpoint of a fit in progress."""
        assert self.root is not None
        return self.root / point.folder / _STATE


def _union(interventions: Sequence[Intervention], n_groups: int) -> Intervention:
    """A stack with one group for each, at all layers that any of them has."""
    first = interventions[0]
    layers = tuple(sorted({layer for one in interventions for layer in one.location.layers}))
    return type(first)(replace(first.location, layers=layers), n_groups=n_groups, device=first.device)


def _places(stack: Intervention, intervention: Intervention) -> Tensor:
    """The indices of the intervention's layers among the stack's, int64 [L]."""
    layers = intervention.location.layers
    return torch.tensor([stack.location.layers.index(layer) for layer in layers], device=stack.device)


def _copy_values(source: Intervention, target: Intervention) -> None:
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(source.get_parameter(name))


class _Bar:
    """A progress bar over all steps that also counts finished fits; earlier steps do not affect the time left."""

    def __init__(self, total: int, n_fits: int, show: bool) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=total, desc="sweep", disable=not show, unit="step", dynamic_ncols=True)
        self.done, self.n_fits = 0, n_fits

    def __enter__(self) -> Self:
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
