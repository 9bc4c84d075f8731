"""Work of hours: memory, kills, interrupts, early stops, too little memory and numbers that are none."""

from __future__ import annotations

import gc
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from fit_cases import OBJECTIVE, conflicts, run, start_fit, steps_in, whole_fit
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast import ops
from actscale_fast.learning.encoded_examples import EncodedExamples
from actscale_fast.learning.engine import Engine, FitRequest


def tensors_alive() -> tuple[int, int]:
    """(count, bytes of distinct storages) of all tensors."""
    gc.collect()
    found = [value for value in gc.get_objects() if type(value) in (Tensor, nn.Parameter)]
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in found}
    return len(found), sum(storages.values())


@pytest.mark.parametrize(
    ("where", "cache_bytes"),
    [({}, 1 << 30), ({"positions": [-1]}, 1 << 30), ({"positions": [-1]}, 0), ({"layers": [2]}, 0)],
    ids=str,
)
def test_no_step_keeps_a_tensor(where: dict[str, Any], cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, counts, step = [], [], Engine.gradients

    def counting(self: Engine, requests: list[FitRequest]) -> Any:
        calls.append(1)
        if len(calls) in (4, 17, 30):  # the first steps fill the caches of libraries
            counts.append(tensors_alive())
        return step(self, requests)

    monkeypatch.setattr(Engine, "gradients", counting)
    model = tiny.llama()
    scalars = af.ActivScalar.for_model(model, **where)
    run(model, conflicts(9), OBJECTIVE, steps=30, batch_size=4, intervention=scalars, cache_bytes=cache_bytes)
    assert len(calls) == 30
    assert len(set(counts)) == 1


def test_a_fit_gives_its_memory_back() -> None:
    model = tiny.llama()
    run(model, conflicts(9), steps=2, intervention=af.ActivScalar.for_model(model, positions=[-1]))
    before = tensors_alive()
    for _ in range(3):
        run(model, conflicts(9), steps=2, intervention=af.ActivScalar.for_model(model, positions=[-1]))
    assert tensors_alive() == before


def test_the_processs_memory_does_not_grow_with_its_steps() -> None:
    model, seen = tiny.llama(), []
    scalars, objective = af.ActivScalar.for_model(model), OBJECTIVE
    data = EncodedExamples(conflicts(8), tiny.tokenizer(), model)
    with torch.enable_grad(), Engine(model, data, scalars, [objective]) as engine:
        for step in range(200):
            engine.gradients([FitRequest(range(8), objective)])
            if step in (100, 199):
                gc.collect()
                seen.append(psutil.Process().memory_info().rss)
    assert seen[1] - seen[0] < 4 << 20


def interrupted(path: Path, after: int, how: signal.Signals) -> int:
    """Start the fit in a process of its own and send it a signal once it has taken `after` steps; steps it printed."""
    process = start_fit(path, torch.get_num_threads())
    assert process.stdout is not None
    taken = 0
    for line in process.stdout:
        taken = int(line)
        if taken == after:
            process.send_signal(how)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0, errors
    assert taken == after, errors
    return taken


@pytest.mark.parametrize("after", [5])
def test_a_killed_fit_loses_one_interval_at_most_and_ends_with_the_same_bits(tmp_path: Path, after: int) -> None:
    path = tmp_path / "fit.safetensors"
    interrupted(path, after, signal.SIGKILL)
    assert after - 2 < steps_in(path) <= after
    resumed, whole = whole_fit(checkpoint=path, checkpoint_every=2), whole_fit()
    assert torch.equal(resumed.intervention.alpha, whole.intervention.alpha)
    assert resumed.history == whole.history


def test_ctrl_c_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    interrupted(path, 3, signal.SIGINT)
    assert steps_in(path) == 3
    resumed, whole = whole_fit(checkpoint=path, checkpoint_every=2), whole_fit()
    assert torch.equal(resumed.intervention.alpha, whole.intervention.alpha)
    assert resumed.history == whole.history
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actscale_fast.learning import checkpoint

    path, write = tmp_path / "fit.safetensors", checkpoint.save_file

    def torn(tensors: Any, file: Any, **options: Any) -> None:
        write(tensors, file, **options)
        if path.exists():
            Path(file).write_bytes(Path(file).read_bytes()[:100])
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(checkpoint, "save_file", torn)
        with pytest.raises(KeyboardInterrupt):
            whole_fit(checkpoint=path, checkpoint_every=2)
    assert steps_in(path) == 2
    assert torch.equal(
        whole_fit(checkpoint=path, checkpoint_every=2).intervention.alpha, whole_fit().intervention.alpha
    )


def test_a_fit_stops_once_nothing_moves(tmp_path: Path) -> None:
    still = whole_fit(tolerance=1e9, patience=3)
    assert len(still.history) == 3
    never = whole_fit(tolerance=0.0)
    assert len(never.history) == 12
    strong = run(tiny.llama(), conflicts(9), af.Objective(minimality=1e4), steps=12, tolerance=0.0, patience=4)
    assert len(strong.history) == 4
    assert all(record["moved"] == 0 for record in strong.history)
    moves = [record["moved"] for record in never.history]
    tolerance = sorted(moves)[6]
    stopped = whole_fit(tolerance=tolerance, patience=2, checkpoint=tmp_path / "fit.safetensors")
    first = next(step for step in range(2, 13) if max(moves[step - 2 : step]) <= tolerance)
    assert len(stopped.history) == first
    again = whole_fit(tolerance=tolerance, patience=2, checkpoint=tmp_path / "fit.safetensors")
    assert again.history == stopped.history


def failing_at(monkeypatch: pytest.MonkeyPatch, calls: set[int], error: Callable[[], Exception]) -> list[int]:
    """Let the loss fail at these calls; the list of all calls' numbers of rows."""
    sizes: list[int] = []
    loss = ops.linear_intervention_loss

    def failing(hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(hidden.shape[0])
        if len(sizes) in calls:
            raise error()
        return loss(hidden, *arguments, **options)

    monkeypatch.setattr(ops, "linear_intervention_loss", failing)
    return sizes


def on_gpu() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def on_cpu() -> Exception:
    return RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to")


@pytest.mark.parametrize("error", [on_gpu, on_cpu])
@pytest.mark.parametrize("where", [{}, {"layers": [2]}, {"positions": [-1]}], ids=str)
def test_passes_are_halved_once_where_memory_runs_out(
    error: Callable[[], Exception], where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fitted() -> Tensor:
        model = tiny.llama()
        result = run(
            model, conflicts(8), OBJECTIVE, batch_size=8, intervention=af.ActivScalar.for_model(model, **where)
        )
        return result.intervention.alpha.detach()

    expected = fitted()
    sizes = failing_at(monkeypatch, {4}, error)
    with pytest.warns(UserWarning, match=r"out of memory with (\d+) tokens in a pass; continuing with at most") as said:
        found = fitted()
    assert len(said) == 1
    assert max(sizes[4:]) <= max(sizes[1:4]) / 2 + 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    failing_at(monkeypatch, {4, 11}, error)  # a second time: layers are recomputed
    with pytest.warns(UserWarning, match="out of memory") as said:
        torch.testing.assert_close(fitted(), expected, rtol=1e-4, atol=1e-5)
    assert len(said) == 1
    failing_at(monkeypatch, {4, 11, 14}, error)
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(RuntimeError, match="memory"):
        fitted()


def test_memory_that_one_prompt_does_not_fit_in_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_at(monkeypatch, {2}, on_gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(torch.OutOfMemoryError):
            run(tiny.llama(), conflicts(1), OBJECTIVE)


def test_another_error_is_not_taken_for_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_at(monkeypatch, {3}, lambda: RuntimeError("something else"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="something else"):
            run(tiny.llama(), conflicts(8), OBJECTIVE)


@pytest.mark.parametrize("what", ["gradient", "term"])
def test_a_number_that_is_none_stops_the_fit_with_the_state_before(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = run(tiny.llama(), conflicts(9), OBJECTIVE, steps=12, schedule="constant", tolerance=None)
    gradients, calls = Engine.gradients, []

    def broken(self: Engine, requests: list[FitRequest]) -> Any:
        terms, found = gradients(self, requests)
        calls.append(1)
        if len(calls) == 5:
            (found[0] if what == "gradient" else terms).view(-1)[0] = float("nan")
        return terms, found

    path = tmp_path / "fit.safetensors"
    model = tiny.llama()
    scalars = af.ActivScalar.for_model(model)
    options: dict[str, Any] = {"steps": 12, "schedule": "constant", "checkpoint": path, "checkpoint_every": 2}
    message = "step 4: " + ("a gradient is not finite" if what == "gradient" else "the effectiveness term is nan")
    with monkeypatch.context() as context:
        context.setattr(Engine, "gradients", broken)
        with pytest.raises(FloatingPointError, match=message):
            run(model, conflicts(9), OBJECTIVE, intervention=scalars, **options)
    assert steps_in(path) == 4
    assert scalars.l1 == short.history[3]["minimality"]
    resumed = run(tiny.llama(), conflicts(9), OBJECTIVE, **options)
    assert torch.equal(resumed.intervention.alpha, short.intervention.alpha)
