"""Several jobs on one grid in one folder: killed at any moment, they leave what one process leaves, bit for bit."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fit_cases import conflicts
from sweep_cases import run_sweep

import actscale_fast as af
from actscale_fast._json import write_sealed
from actscale_fast._locks import locked, try_lock
from actscale_fast.learning.distributed import _is_worker_of_ray, process_group
from actscale_fast.learning.fit_state import FitState

GRID: dict[str, Any] = {"minimality": ["60%", 0.05], "seed": [0, 1, 2]}
OPTIONS: dict[str, Any] = {"warm_start": True, "at_once": 1, "checkpoint_every": 1, "steps": 2}


def run_share(folder: Path, points: str | None = None, grid: Any = None, **options: Any) -> af.SweepResult:
    return run_sweep(grid or GRID, evaluate_on=conflicts(3, seed=9), folder=folder, points=points, **OPTIONS | options)


def in_child(work: Callable[[], Any], killed_at: int | None = None) -> int:
    """Start a copy of this process that does the work; it kills itself before that file reaches the disk."""
    child = os.fork()
    if child:
        return child
    status = 1
    with contextlib.suppress(BaseException):
        torch.set_num_threads(1)
        sync, calls = os.fsync, [0]

        def killing(handle: int) -> None:
            calls[0] += 1
            if calls[0] == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(handle)

        os.fsync = killing  # type: ignore[assignment]
        work()
        status = 0
    os._exit(status)


def ends(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_jobs_that_are_killed_leave_the_folder_of_one_process(tmp_path: Path) -> None:
    one, jobs = tmp_path / "one", tmp_path / "jobs"
    grid = dict(GRID, seed=[0, 1])
    run_share(one, grid=grid)
    shares = ["1/2", "2/2"]
    for killed_at in (3, 9, None):  # in a checkpoint, in a finished fit
        started = [
            in_child(lambda share=share: run_share(jobs, share, grid=grid), killed_at and killed_at + index)  # type: ignore[misc]
            for index, share in enumerate(shares)
        ]
        assert ends(started) == [-signal.SIGKILL if killed_at else 0] * 2
    expected, found = contents(one), contents(jobs)
    assert found.pop("points.json")
    assert found == expected  # the index too, and neither locks nor temporaries
    (jobs / "sweep.json").unlink()
    result = af.gather_sweep(jobs)
    assert contents(jobs)["sweep.json"] == expected["sweep.json"]
    assert [fit.label for fit in result.fits] == [fit.label for fit in af.load_sweep(one).fits]


def test_a_path_stays_in_one_share_and_a_share_is_the_same_alone(tmp_path: Path) -> None:
    first = run_share(tmp_path, "1/2")
    assert [fit.label for fit in first.fits] == [
        "minimality=60%, seed=0", "minimality=60%, seed=2", "minimality=0.05, seed=0", "minimality=0.05, seed=2"
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError, match="its jobs have not finished: gather_sweep says what is missing"):
        af.load_sweep(tmp_path)
    with pytest.raises(ValueError, match=r"2 of 6 points in .* are not finished: minimality=60%, seed=1 \(.*run their"):
        af.gather_sweep(tmp_path)
    with pytest.raises(ValueError, match="other settings: steps 2, now 3; give all jobs the same"):
        run_share(tmp_path, "2/2", steps=3)
    other = dict(GRID, seed=[0, 7])
    with pytest.raises(ValueError, match=r"have other points \(.*seed=1.* is not among these, .*seed=7"):
        run_sweep(other, evaluate_on=conflicts(3, seed=9), folder=tmp_path, points="2/2", **OPTIONS)
    assert run_share(tmp_path, "4/4").fits == []  # three paths
    run_share(tmp_path, "2/2")
    assert len(af.load_sweep(tmp_path).fits) == 6


def test_a_job_takes_the_weights_that_the_first_one_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_share(tmp_path, "1/2")
    with monkeypatch.context() as context:
        # The attribute `sweep` of the package is the function of that name.
        context.setattr(importlib.import_module("actscale_fast.learning.sweep.shares"), "resolved_minimality", None)
        run_share(tmp_path, "2/2")
    points = json.loads((tmp_path / "points.json").read_text())["points"]
    weights = {fit.settings["minimality"] for fit in af.gather_sweep(tmp_path).fits if "60%" in fit.label}
    assert weights == {point["minimality"] for point in points if "60%" in point["label"]}


def test_a_fit_of_another_process_is_waited_for_and_taken_over_if_that_ends(tmp_path: Path) -> None:
    run_sweep({"seed": [0]}, folder=tmp_path)
    (place,) = (path for path in tmp_path.iterdir() if path.is_dir())
    expected = contents(tmp_path)
    (place / "summary.json").unlink()
    held = try_lock(place / ".lock")
    assert held is not None
    threading.Timer(0.5, held.release).start()
    run_sweep({"seed": [0]}, folder=tmp_path)
    assert contents(tmp_path) == expected


def test_parts_of_a_grid_that_are_fitted_one_after_another_share_an_index(tmp_path: Path) -> None:
    for seed in (0, 1):
        run_sweep({"seed": [seed]}, folder=tmp_path)
    run_sweep({"seed": [0]}, folder=tmp_path, steps=1)  # another grid
    assert [(fit.label, len(fit.history)) for fit in af.load_sweep(tmp_path).fits] == [("seed=0", 1)]
    run_sweep({"seed": [1]}, folder=tmp_path)
    assert [(fit.label, len(fit.history)) for fit in af.load_sweep(tmp_path).fits] == [("seed=1", 6), ("seed=0", 6)]
    with pytest.raises(ValueError, match=r"belong to 2 grids; .* differ in steps 1 and 6"):
        af.gather_sweep(tmp_path)


def test_fits_that_cannot_be_compared_are_not_gathered(tmp_path: Path) -> None:
    for seed, held_out in ((0, 9), (1, 8)):
        run_sweep({"seed": [seed]}, folder=tmp_path, evaluate_on=conflicts(3, seed=held_out))
    with pytest.raises(ValueError, match=r"seed=0-.* and seed=1-.* were evaluated on different examples"):
        af.gather_sweep(tmp_path)
    (place,) = tmp_path.glob("seed=1-*")
    (place / "evaluation.json").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 points .*: seed=1 \(.*\), which is not evaluated yet"):
        af.gather_sweep(tmp_path)
    summary = json.loads((place / "summary.json").read_text())
    write_sealed(place / "summary.json", {name: summary[name] for name in summary if name != "family"})
    with pytest.raises(ValueError, match=r"seed=1-.* was fitted by an earlier version, which did not record"):
        af.gather_sweep(tmp_path)


def test_a_job_that_starts_from_other_values_is_refused(tmp_path: Path) -> None:
    scalars = af.ActivScalar.for_model(tiny.llama())
    run_sweep({"seed": [0, 1]}, folder=tmp_path, points="1/2", intervention=scalars)
    with torch.no_grad():
        scalars.alpha.fill_(0.1)
    with pytest.raises(ValueError, match=r"the jobs of .* fit seed=0 in .*; give all jobs the same starting values"):
        run_sweep({"seed": [0, 1]}, folder=tmp_path, points="2/2", intervention=scalars)


def test_a_failed_fit_is_gathered_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = FitState.update

    def breaks(self: FitState, terms: Any, gradients: Any) -> None:
        update(self, terms * torch.nan if self.name == "seed=1" else terms, gradients)

    with monkeypatch.context() as context:
        context.setattr(FitState, "update", breaks)
        with pytest.warns(UserWarning, match="the effectiveness term is nan"):
            run_sweep({"seed": [0, 1]}, folder=tmp_path, points="1/1")
    assert [fit.error is None for fit in af.gather_sweep(tmp_path).fits] == [True, False]
    run_sweep({"seed": [0, 1]}, folder=tmp_path, points="1/1")
    assert [fit.error for fit in af.gather_sweep(tmp_path).fits] == [None, None]


def test_a_point_that_cannot_begin_is_left_to_the_job_that_works_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = FitState.update

    def breaks(self: FitState, terms: Any, gradients: Any) -> None:
        update(self, terms * torch.nan if "minimality=0.2" in self.name else terms, gradients)

    grid = {"minimality": [0.2, 0.02], "seed": [0]}
    run_share(tmp_path, "1/1", grid)
    (second,) = (path for path in tmp_path.iterdir() if path.name.startswith("minimality=0.02"))
    summary = (second / "summary.json").rename(tmp_path / "summary")
    for path in tmp_path.glob("minimality=0.2_*/*"):
        path.unlink()
    lock = try_lock(second / ".lock")
    assert lock is not None
    let_go = threading.Timer(1.0, lambda: (summary.rename(second / "summary.json"), lock.release()))
    monkeypatch.setattr(FitState, "update", breaks)
    let_go.start()
    with pytest.warns(UserWarning, match="the effectiveness term is nan"):
        result = run_share(tmp_path, "1/1", grid)
    let_go.join()
    assert [fit.error is None for fit in result.fits] == [False, True]
    assert not (second / "failure.json").exists()


@pytest.mark.parametrize("points", ["0/4", "5/4", "2", "1/0", "a/b"])
def test_a_share_is_counted_from_one(points: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"points: got '{points}', expected a share such as '2/4', counted from 1"):
        run_sweep({"seed": [0]}, folder=tmp_path, points=points)


def test_a_share_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="points: got '1/2' without a folder"):
        run_sweep({"seed": [0]}, points="1/2")
    with pytest.raises(TypeError, match="points: got int, expected a share"):
        run_sweep({"seed": [0]}, points=2)


def test_a_lock_admits_one_holder_and_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    held = try_lock(path)
    assert held is not None
    assert try_lock(path) is None
    held.release()
    held.release()
    assert not path.exists()
    ready, go = os.pipe()
    child = os.fork()
    if not child:
        mine = try_lock(path)
        os.write(go, b"1" if mine else b"0")
        signal.pause()
    assert os.read(ready, 1) == b"1"
    assert try_lock(path) is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    again = try_lock(path)
    assert again is not None
    again.release()


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(handle: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    caplog.set_level("INFO", logger="actscale_fast")
    monkeypatch.setattr(fcntl, "flock", missing)
    with locked(tmp_path / ".lock", "a test"), locked(tmp_path / ".lock", "another"):
        pass
    (told,) = caplog.messages
    assert "has no locks (Function not implemented); jobs may do the same work twice" in told


def test_what_killed_processes_left_is_cleared(tmp_path: Path) -> None:
    run_sweep({"seed": [0]}, folder=tmp_path)
    before = contents(tmp_path)
    (place,) = (path for path in tmp_path.iterdir() if path.is_dir())
    from actscale_fast import _files

    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    name = _files._temporary_name(place / "summary.json").replace(f"-{os.getpid()}-", f"-{child}-")
    (place / name).write_text("half")
    (place / ".lock").write_text("a process that is gone")
    run_sweep({"seed": [0]}, folder=tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_ranks_of_ray_are_not_taken_for_ours(
    launcher: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="actscale_fast")
    ray = types.SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    if launcher == "ray":
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        with process_group(None) as processes:
            assert processes.size == 1
        (told,) = caplog.messages
        assert "distributed=True shares the work with the others" in told
    else:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
        assert not _is_worker_of_ray()
