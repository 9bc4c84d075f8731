"""The loop of a sweep: all fits in progress take a step together, each with its own state."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..._locks import POLL, HeldLock, holder, try_lock
from ..._log import notice
from ...interventions import Intervention
from ..distributed import SINGLE_PROCESS, ProcessGroup
from ..encoded_examples import EncodedExamples
from ..engine import Engine, FitRequest, active_region
from ..execution import Execution
from ..fit_state import FitState
from ..zero_gradient import ZeroGradientError, ZeroGradientWatch
from .fit_folder import LOCK, finished, write_finished
from .grid import Point
from .progress import SweepBar
from .result import SweepFit
from .stack import copy_values, places as places_in, union

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STATE = "state.safetensors"
#: Seconds after which a sweep says that it waits for fits of other processes.
_PATIENCE = 5.0


class _Chain:
    """What is left of the points that are fitted one after another."""

    def __init__(self, points: Iterable[Point]) -> None:
        self.points = deque(points)
        self.before: Intervention | None = None  # the result of the previous fit


class _Slot:
    """A row group of the batch, which the fits of a chain use one after another."""

    def __init__(self) -> None:
        self.chain = _Chain(())
        self.point: Point | None = None
        self.state: FitState | None = None
        self.watch: ZeroGradientWatch | None = None
        self.error: str | None = None
        self.lock: HeldLock | None = None  # of the point's folder

    def release(self) -> None:
        """Let other processes have the point."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None


class SweepLoop:
    """The loop over the fits of one process, or of the processes that hold a model together."""

    def __init__(
        self, model: PreTrainedModel, data: EncodedExamples, rows_of: dict[str | None, range], root: Path | None,
        checkpoint_every: int, execution: Execution, processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:  # fmt: skip
        self.model, self.data, self.rows_of, self.root = model, data, rows_of, root
        self.checkpoint_every, self.execution, self.processes = checkpoint_every, execution, processes
        self.fits: dict[int, SweepFit] = {}  # the result of each point, by the point's id
        self.busy: list[_Chain] = []  # chains whose next point another process is working on

    def run(
        self, chains: Sequence[Sequence[Point]], at_once: int, progress: bool, whole_grid: Sequence[Point] = ()
    ) -> dict[int, SweepFit]:
        """Run all fits of these chains; those that can share one engine run together.

        A point that another process is working on is left to it, and its result is read afterwards; if that process
        ends before it has finished, the point is continued here.

        Args:
            chains: the points, those of a chain one after another.
            at_once: the largest number of fits in progress.
            progress: show a bar.
            whole_grid: all points, if these are the share of one job: passes are laid out for all of them, so that
                the division changes no rounding of a fit that runs alone.
        """
        total = sum(point.settings.steps for chain in chains for point in chain)
        everything: dict[Any, list[Point]] = {}
        for point in whole_grid or [point for chain in chains for point in chain]:
            everything.setdefault(self._kind(point.intervention), []).append(point)
        waiting = [_Chain(chain) for chain in chains]
        since: float | None = None
        with SweepBar(total, sum(map(len, chains)), progress) as bar:
            while waiting:
                together: dict[Any, list[_Chain]] = {}
                for chain in waiting:
                    together.setdefault(self._kind(chain.points[0].intervention), []).append(chain)
                before = len(self.fits)
                for kind, same in together.items():
                    self._run_together(same, min(at_once, len(same)), everything[kind], bar)
                waiting, self.busy = self.busy, []
                since = self._wait(waiting, since if len(self.fits) == before else None)
        return self.fits

    def _wait(self, waiting: list[_Chain], since: float | None) -> float | None:
        """Sleep if other processes have all that is left, and say so after a while; returns since when this is so."""
        if not waiting:
            return None
        now = time.monotonic()
        if since is not None and since < now - _PATIENCE and self.processes.is_rank_zero:
            path = self._lock_file(waiting[0].points[0])
            notice(
                f"sweep: waiting for {len(waiting)} fits that other processes are working on, such as "
                f"{path.parent.name} ({holder(path)})"
            )
            since = float("inf")  # once is enough
        time.sleep(POLL)
        return now if since is None else since

    def _kind(self, intervention: Intervention) -> Any:
        """What interventions must have in common to run in one batch."""
        location = intervention.location
        first = active_region(intervention, self.data).first_layer
        return type(intervention), location.module_key, location.positions, location.generated, first

    def _run_together(self, chains: Sequence[_Chain], n_slots: int, alike: Sequence[Point], bar: Any) -> None:
        """Run chains whose interventions can share a batch; `alike` are all points of the grid that could."""
        waiting = deque(chains)
        slots = [_Slot() for _ in range(n_slots)]
        with contextlib.ExitStack() as locks:
            for slot in slots:
                locks.callback(slot.release)
                self._advance(slot, waiting, bar)
            if all(slot.state is None for slot in slots):
                return
            stack = union([point.intervention for point in alike], n_slots)
            objectives = [point.objective for point in alike]
            engine = Engine(
                self.model, self.data, stack, objectives, self.execution, self.processes, self._stages(alike)
            )
            self._take_steps(engine, stack, slots, waiting, bar)

    def _stages(self, points: Sequence[Point]) -> list[list[int]]:
        """For each order of the examples that some of these points have: the rows that their steps use."""
        used: dict[Any, list[int]] = {}
        for point in points:
            rows, settings = self.rows_of[point.task], point.settings
            uses = settings.first_uses(len(rows))
            key = (point.task, settings.seed, settings.batch_size >= len(rows))
            if len(uses) > len(used.get(key, ())):
                used[key] = [rows[row] for row in uses]
        return list(used.values())

    def _take_steps(
        self, engine: Engine, stack: Intervention, slots: Sequence[_Slot], waiting: deque[_Chain], bar: Any
    ) -> None:
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
                places.append(places_in(stack, slot.state.intervention))
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

    def _after_step(self, slot: _Slot, waiting: deque[_Chain], bar: Any) -> None:
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
            warnings.warn(f"sweep: {slot.error}; the other fits continue", stacklevel=6)
            self._finish(slot, bar, slot.error)
            for point in slot.chain.points:
                point.error = f"not begun: {slot.error}"
            while slot.chain.points:
                self._failed(slot, slot.chain.points.popleft(), bar)
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
        if self.root is not None:
            if error is None:
                state.save()
            if self.processes.is_rank_zero:
                write_finished(self.root, fit, point.family)
                if error is None:
                    self._state_file(point).unlink(missing_ok=True)
        slot.release()
        self.fits[id(point)] = fit
        slot.chain.before, slot.state = state.intervention, None
        bar.update(point.settings.steps - state.taken)
        bar.fits_done()

    def _failed(self, slot: _Slot, point: Point, bar: Any) -> bool:
        """Note that a point cannot begin; False if another process has finished it or is working on it."""
        found, is_free = self._claim(slot, point)
        if not is_free:
            self.busy.append(_Chain([point]))
            return False
        noted = found is None
        if found is None:
            assert point.error is not None
            found = SweepFit.of(point, point.intervention, [], point.error)
            if self.root is not None and self.processes.is_rank_zero:
                write_finished(self.root, found, point.family)
        slot.release()
        self.fits[id(point)] = found
        bar.update(point.settings.steps)
        bar.fits_done()
        return noted

    def _advance(self, slot: _Slot, waiting: deque[_Chain], bar: Any) -> None:
        """Give the slot its next unfinished fit; `slot.state` stays None if there is none."""
        while (point := self._next_point(slot, waiting)) is not None:
            if point.error is not None:
                if self._failed(slot, point, bar):
                    warnings.warn(f"sweep: {point.error}; the other fits continue", stacklevel=5)
                continue
            found, is_free = self._claim(slot, point)
            if not is_free:
                slot.chain.points.appendleft(point)
                self.busy.append(slot.chain)
                slot.chain = _Chain(())
                continue
            if found is not None:
                self.fits[id(point)] = found
                slot.chain.before = found.intervention
                if self.processes.is_rank_zero:
                    self._state_file(point).unlink(missing_ok=True)  # of a killed process
                slot.release()
                bar.skip(point.settings.steps)
                bar.fits_done()
                continue
            self._begin(slot, point)
            assert slot.state is not None
            bar.skip(slot.state.taken)
            if not slot.state.done():
                return
            self._finish(slot, bar)

    def _claim(self, slot: _Slot, point: Point) -> tuple[SweepFit | None, bool]:
        """(the result of a point that is finished, False if another job is working on it); else it is locked.

        The processes that hold a model together do what the first of them finds; it holds the lock for all.
        """
        root = self.root
        if root is None:
            return None, True

        def claim() -> tuple[SweepFit | None, bool]:
            found = finished(root, point)
            if found is not None:
                return found, True
            path = self._lock_file(point)
            path.parent.mkdir(parents=True, exist_ok=True)
            slot.lock = try_lock(path)
            # It may have been finished by a process that has let go of it since.
            return (None, False) if slot.lock is None else (finished(root, point), True)

        found, is_free = self.processes.model.from_leader(claim)
        if found is not None:  # that of the first process is on its device
            found.intervention.to(point.intervention.device)
        return found, is_free

    def _next_point(self, slot: _Slot, waiting: deque[_Chain]) -> Point | None:
        """The next point of the slot's chain, or else of the next chain that is waiting."""
        while not slot.chain.points:
            if not waiting:
                return None
            slot.chain = waiting.popleft()
        return slot.chain.points.popleft()

    def _begin(self, slot: _Slot, point: Point) -> None:
        """Start the fit of a point, or resume it from its checkpoint."""
        if slot.chain.before is not None:
            copy_values(slot.chain.before, point.intervention)
        path = None if self.root is None else self._state_file(point)
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

    def _lock_file(self, point: Point) -> Path:
        """The lock of a fit in progress."""
        assert self.root is not None
        return self.root / point.folder / LOCK
