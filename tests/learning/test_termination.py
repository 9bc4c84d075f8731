"""SIGTERM saves as Ctrl-C does, and a place that cannot be written is found before the model runs."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fit_cases import conflicts, run, start_fit, steps_in, whole_fit
from sweep_cases import run_sweep

import actscale_fast as af
from actscale_fast.learning.fit_state import FitState
from actscale_fast.learning.termination import saving_on_sigterm


class StoppedError(Exception):
    """Of a handler that was there before."""


#: The module; the package hands on its function of that name.
LEARNING = importlib.import_module("actscale_fast.das.fit_interchange")


def stop(number: int, frame: Any) -> None:
    raise StoppedError


@pytest.fixture
def own_handler() -> Any:
    """A handler of the caller's own, which must be in force again afterwards."""
    before = signal.signal(signal.SIGTERM, stop)
    yield
    assert signal.getsignal(signal.SIGTERM) is stop
    signal.signal(signal.SIGTERM, before)


def terminate_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    update = FitState.update

    def updated(self: FitState, *given: Any) -> None:
        update(self, *given)
        if self.taken == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(FitState, "update", updated)


@pytest.mark.usefixtures("own_handler")
def test_a_terminated_fit_keeps_its_last_step_and_the_former_handler_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fit.safetensors"
    with monkeypatch.context() as context:
        terminate_after(5, context)
        with pytest.raises(StoppedError):
            whole_fit(checkpoint=path, checkpoint_every=100)
    assert steps_in(path) == 5
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    resumed, whole = whole_fit(checkpoint=path), whole_fit()
    assert torch.equal(resumed.intervention.alpha, whole.intervention.alpha)
    assert resumed.history == whole.history


@pytest.mark.usefixtures("own_handler")
def test_a_terminated_sweep_keeps_the_last_step_of_every_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        terminate_after(3, context)
        with pytest.raises(StoppedError):
            run_sweep({"seed": [0, 1]}, folder=tmp_path, checkpoint_every=100)
    assert sorted(steps_in(path) for path in tmp_path.glob("*/state.safetensors")) in ([2, 3], [3, 3])
    again, whole = run_sweep({"seed": [0, 1]}, folder=tmp_path), run_sweep({"seed": [0, 1]})
    for one, other in zip(again.fits, whole.fits, strict=True):
        assert len(one.history) == len(other.history)
        # Fits that were stopped in the middle of a step share other batches, which round otherwise.
        torch.testing.assert_close(one.intervention.alpha, other.intervention.alpha, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("own_handler")
def test_a_terminated_interchange_fit_keeps_its_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = LEARNING.InterchangeState.step

    def stepped(self: Any, pairs: Any) -> None:
        step(self, pairs)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LEARNING.InterchangeState, "step", stepped)
    model, examples = (
        tiny.llama(),
        [
            af.Example(one.prompt, one.correct, one.wrong, source=other.prompt)
            for one, other in zip(conflicts(4), conflicts(4, seed=1), strict=True)
        ],
    )
    das = af.BoundlessDAS.for_model(model, layers=[1], positions=[-1])
    with pytest.raises(StoppedError):
        af.fit_interchange(
            model, tiny.tokenizer(), examples, das, steps=3, batch_size=4, progress=False,
            checkpoint=tmp_path / "das.safetensors",
        )  # fmt: skip
    assert steps_in(tmp_path / "das.safetensors") == 1


def test_without_a_handler_the_process_ends_by_the_signal_after_saving(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    with start_fit(path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 3:
                process.terminate()
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, errors
    assert steps_in(path) == 3


def test_a_handler_that_returns_is_followed_by_the_end_of_the_process() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(SystemExit) as ended, saving_on_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (ended.value.code, seen) == (143, [signal.SIGTERM])


def test_ignored_signals_other_threads_and_fits_that_keep_nothing_are_left_alone() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with saving_on_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        signal.signal(signal.SIGTERM, stop)
        with saving_on_sigterm(False):
            assert signal.getsignal(signal.SIGTERM) is stop
        seen: list[Any] = []

        def elsewhere() -> None:
            with saving_on_sigterm():
                seen.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert seen == [stop]
    finally:
        signal.signal(signal.SIGTERM, before)


def file_as_folder(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "inner"


def without_room(folder: Path) -> Path:
    return folder / "full"


def read_only(folder: Path) -> Path:
    if os.geteuid() == 0:
        return Path("/proc/self/inner")  # root may write everywhere else
    (folder / "locked").mkdir(mode=0o500)
    return folder / "locked" / "inner"


@pytest.mark.parametrize("place", [file_as_folder, without_room, read_only])
@pytest.mark.parametrize("what", ["fit", "sweep"])
def test_a_place_that_cannot_be_written_is_found_before_the_model_runs(
    place: Callable[[Path], Path], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place(tmp_path)
    if place is without_room:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=-1))
    model = tiny.llama()
    scalars = af.ActivScalar.for_model(model)
    before = sorted(tmp_path.rglob("*"))
    ran: list[int] = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    call: Callable[[], Any] = {
        "fit": lambda: run(model, conflicts(4), checkpoint=path / "fit.safetensors", intervention=scalars),
        "sweep": lambda: run_sweep({"seed": [0]}, model, folder=path),
    }[what]
    with pytest.raises(OSError, match=str(path)):
        call()
    assert not ran
    assert [place for place in sorted(tmp_path.rglob("*")) if place.is_file()] == [
        place for place in before if place.is_file()
    ]


def test_a_finished_fit_is_read_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fit.safetensors"
    first = run(tiny.llama(), conflicts(4), checkpoint=path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    assert run(tiny.llama(), conflicts(4), checkpoint=path).history == first.history


def test_a_disk_that_fills_later_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from actscale_fast import _files

    path, sync, calls = tmp_path / "fit.safetensors", os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 2:  # the first checkpoint and its folder
            raise OSError(28, "No space left on device")
        sync(handle)

    with monkeypatch.context() as context:
        context.setattr(_files.os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*fit\.safetensors'"):
            whole_fit(checkpoint=path, checkpoint_every=2)
    assert steps_in(path) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
