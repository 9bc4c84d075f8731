"""The loop of a sweep: fits in the places of a batch, each with its own state, one step of all of them at a time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...interventions import Intervention
from ..encoded_examples import EncodedExamples
from ..engine import Engine, Share, extent_of
from ..fit_state import Run
from .folder import finished, write_finished
from .grid import Point
from .result import SweepFit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STATE = "state.safetensors"


class _Slot:
    """A place in the batch: a chain of fits that take it one after another."""

    def __init__(self, chain: Iterator[Point]) -> None:
        self.chain = chain
        self.point: Point | None = None
        self.run: Run | None = None
        self.error: str | None = None
        self.before: Intervention | None = None  # the result of the fit before in the chain


class SweepLoop:
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
        with _Bar(total, sum(map(len, chains)), progress) as bar:
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
        engine = Engine(self.model, self.data, stack, [point.objective for point in all_points], **self.engine)
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
                        with contextlib.suppress(FloatingPointError):  # this fit keeps its last checkpoint
                            slot.run.save()

    def _step(self, engine: Engine, stack: Intervention, busy: list[tuple[int, _Slot]]) -> None:
        shares, places = [], []
        with torch.no_grad():
            for number, slot in busy:
                assert slot.run is not None
                places.append(_places(stack, slot.run.intervention))
                for name, parameter in stack.named_parameters():
                    parameter[number].zero_()
                    parameter[number, places[-1]] = slot.run.intervention.get_parameter(name).detach()
                shares.append(Share(slot.run.rows(), slot.run.objective, number))
        terms, gradients = engine.gradients(shares)
        for (number, slot), place, of_share in zip(busy, places, terms, strict=True):
            assert slot.run is not None
            try:
                slot.run.update(of_share, [gradient[number, place] for gradient in gradients])
            except FloatingPointError as error:
                slot.error = str(error)

    def _after_step(self, slot: _Slot, waiting: Iterator[Sequence[Point]], bar: Any) -> None:
        run = slot.run
        assert run is not None
        try:  # a GPU's figures arrive some steps late
            if run.taken % self.checkpoint_every == 0:
                run.save()
            if run.done():
                run.read(wait=True)
        except FloatingPointError as error:
            slot.error = slot.error or str(error)
        if slot.error is not None:
            warnings.warn(f"sweep: {slot.error}; the other fits go on", stacklevel=4)
            self._finish(slot, bar, slot.error)
            for point in slot.chain:
                self.fits[id(point)] = SweepFit.of(point, point.intervention, [], f"not begun: {slot.error}")
            slot.error = None
            self._advance(slot, waiting, bar)
            return
        if run.done():
            self._finish(slot, bar)
            self._advance(slot, waiting, bar)

    def _finish(self, slot: _Slot, bar: Any, error: str | None = None) -> None:
        run, point = slot.run, slot.point
        assert run is not None
        assert point is not None
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
                assert self.root is not None
                (self.root / point.folder / _STATE).unlink(missing_ok=True)  # of a process killed right after it
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
