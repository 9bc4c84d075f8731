"""Two processes on the CPU, started as torchrun starts them, give the result of one."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fit_cases import conflicts, run

import actscale_fast as af
from actscale_fast import ops
from actscale_fast.learning import distributed
from actscale_fast.learning.fit_settings import FitSettings

OBJECTIVE = af.Objective(margin=2.0, faithfulness=0.5, minimality=0.05)
pytestmark = pytest.mark.slow
N_RANKS = 2
PATIENCE = 300  # seconds before processes that wait for each other are given up


def fitted(
    n_examples: int = 5, *, start: float = 0.0, where: dict[str, Any] | None = None, end: str = "", **options: Any
) -> Any:
    """(scalars, history) of a short fit; `end` makes the correct answers longer."""
    model = tiny.llama()
    scalars = af.ActivScalar.for_model(model, **(where or {}))
    with torch.no_grad():
        scalars.alpha.add_(start)
    examples = [replace(example, correct=example.correct + end) for example in conflicts(n_examples)]
    result = run(model, examples, OBJECTIVE, intervention=scalars, **options)
    return scalars.alpha.detach(), result.history


#: Fits that two processes share.
SHARED: dict[str, dict[str, Any]] = {
    "all heads": {},
    "the last token": {"where": {"positions": [-1]}},
    "the upper layer, nothing kept": {"where": {"layers": [2]}, "cache_bytes": 0},
    "answers of several tokens": {"end": " one two"},
    "fewer prompts than processes": {"n_examples": 1},
    "fewer prompts than processes, accumulated": {"n_examples": 1, "accumulate": 3},
    "an odd number, accumulated": {"n_examples": 7, "batch_size": 5, "accumulate": 2},
    "an early stop": {"steps": 12, "tolerance": 0.03, "patience": 2},
}


def error_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except ValueError as error:
        return str(error)
    return "none"


def interrupted_and_resumed(rank: int, folder: Path) -> Any:
    """A fit that stops in its sixth step, and again to its end; each process has a disk of its own."""
    path = folder / f"disk {rank}" / "fit.safetensors"
    order = FitSettings.rows

    def stopping(self: FitSettings, n: int, step: int) -> list[int]:
        if step == 5:
            raise KeyboardInterrupt
        return order(self, n, step)

    FitSettings.rows = stopping  # type: ignore[method-assign, assignment]
    try:
        fitted(9, steps=8, checkpoint=path, checkpoint_every=2)
    except KeyboardInterrupt:
        pass
    finally:
        FitSettings.rows = order  # type: ignore[method-assign]
    files = [file.name for file in path.parent.glob("*")]
    resumed = fitted(9, steps=8, checkpoint=path, checkpoint_every=2, start=0.5 * rank)
    other = error_of(lambda: fitted(9, steps=8, lr=0.1, checkpoint=path))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"damaged")
    damaged = error_of(lambda: fitted(9, steps=8, checkpoint=path))
    return files, resumed, other, damaged


def without_memory(rank: int) -> Any:
    """A fit whose second process runs out of memory once."""
    loss, calls = ops.linear_intervention_loss, []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if rank == 1 and len(calls) == 4:
            raise torch.OutOfMemoryError("out of memory")
        return loss(*arguments, **options)

    ops.linear_intervention_loss = failing  # type: ignore[assignment]
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result = fitted(8, batch_size=8)
        return result, sum("out of memory" in str(warning.message) for warning in said)
    finally:
        ops.linear_intervention_loss = loss


def swept(folder: Path | None = None, **options: Any) -> Any:
    """(scalars, history, share of answers flipped) of each fit of a sweep."""
    result = af.sweep(
        tiny.llama(), tiny.tokenizer(), conflicts(5), {"minimality": [0.2, 0.02, 0.1], "seed": [0, 1]}, OBJECTIVE,
        steps=4, batch_size=3, folder=folder, evaluate_on=conflicts(4, seed=3), progress=False, **options,
    )  # fmt: skip
    return [(fit.intervention.alpha.detach(), fit.history, fit.score("flips")) for fit in result.fits]


def work(rank: int, port: int, folder: Path, n_threads: int) -> None:
    """What each process does, in the same order."""
    torch.set_num_threads(n_threads)  # the bits of a product depend on it
    found: dict[str, Any] = {"before": torch.distributed.is_initialized()}
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name need not have an address
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(N_RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found["alone"] = fitted(5, seed=rank, distributed=False)
    found["not joined"] = torch.distributed.is_initialized()
    for name, options in SHARED.items():
        found[name] = fitted(**options)
    found["left"] = torch.distributed.is_initialized()
    found["other starts"] = fitted(start=0.3 * (rank + 1))
    found["other examples"] = error_of(lambda: fitted(5 + rank))
    found["resumed"] = interrupted_and_resumed(rank, folder)
    found["memory"] = without_memory(rank)
    found["swept"] = swept(folder / "sweep")
    found["swept again"] = swept(folder / "sweep")
    found["swept along paths"] = swept(warm_start=True)
    found["alone later"] = fitted(5, seed=rank, distributed=False)
    torch.distributed.init_process_group("gloo")  # the caller's own group is used and kept
    found["in the caller's group"] = fitted()
    found["kept"] = torch.distributed.is_initialized()
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = torch.multiprocessing.spawn(work, (port, folder, torch.get_num_threads()), nprocs=N_RANKS, join=False)
    deadline = time.monotonic() + PATIENCE
    while not started.join(timeout=1):
        if time.monotonic() > deadline:
            for process in started.processes:
                process.kill()
            pytest.fail(f"two processes did not come to an end in {PATIENCE} seconds")
    return [torch.load(folder / f"{rank}.pt") for rank in range(N_RANKS)]


def assert_same_bits(ranks: list[Any]) -> None:
    (first, history), *others = ranks
    for other, same in others:
        assert torch.equal(first, other)
        assert history == same


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_give_the_fit_of_one(name: str, ranks: list[dict[str, Any]]) -> None:
    assert_same_bits([found[name] for found in ranks])
    scalars, history = ranks[0][name]
    expected, single = fitted(**SHARED[name])
    torch.testing.assert_close(scalars, expected, rtol=1e-4, atol=1e-5)
    assert len(history) == len(single)
    for record, one in zip(history, single, strict=True):
        assert record["loss"] == pytest.approx(one["loss"], rel=1e-4)
    if "tolerance" in SHARED[name]:
        assert len(history) < SHARED[name]["steps"]


def test_a_group_that_torchrun_describes_lasts_as_long_as_the_call(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert not any(found[when] for when in ("before", "not joined", "left"))


def test_the_callers_group_is_used_and_kept(ranks: list[dict[str, Any]]) -> None:
    assert all(found["kept"] for found in ranks)
    for found in ranks:
        assert_same_bits([found["in the caller's group"], found["all heads"]])


@pytest.mark.parametrize("when", ["alone", "alone later"])
def test_a_process_may_stay_alone(when: str, ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        assert_same_bits([found[when], fitted(5, seed=rank)])
    assert not torch.equal(ranks[0][when][0], ranks[1][when][0])


def test_the_leading_process_says_where_a_fit_starts(ranks: list[dict[str, Any]]) -> None:
    assert_same_bits([found["other starts"] for found in ranks])
    expected, _ = fitted(start=0.3)
    torch.testing.assert_close(ranks[0]["other starts"][0], expected, rtol=1e-4, atol=1e-5)


def test_processes_with_different_fits_are_an_error_in_each(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["other examples"] == "distributed: the processes have different fits: examples, tokens differ"


def test_the_leading_process_alone_writes_and_reads_the_checkpoint(ranks: list[dict[str, Any]]) -> None:
    files, resumed, others, damaged = zip(*(found["resumed"] for found in ranks), strict=True)
    assert files == (["fit.safetensors"], [])
    assert_same_bits(list(resumed))
    scalars, history = resumed[0]
    whole, single = fitted(9, steps=8)
    torch.testing.assert_close(scalars, whole, rtol=1e-4, atol=1e-5)
    assert len(history) == len(single) == 8
    assert all("belongs to another fit: lr 0.05, now 0.1" in other for other in others)
    assert all("truncated or another kind of file" in one for one in damaged)


def test_one_process_without_memory_halves_its_own_passes(ranks: list[dict[str, Any]]) -> None:
    assert_same_bits([found["memory"][0] for found in ranks])
    assert [found["memory"][1] for found in ranks] == [0, 1]
    torch.testing.assert_close(ranks[0]["memory"][0][0], fitted(8, batch_size=8)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"warm_start": True}])
def test_a_sweep_is_split_by_fits_and_every_process_has_all(
    options: dict[str, Any], ranks: list[dict[str, Any]]
) -> None:
    for name in ["swept along paths"] if options else ["swept", "swept again"]:
        for found in ranks:
            assert len(found[name]) == 6
            for (scalars, history, flips), (expected, single, share) in zip(found[name], swept(**options), strict=True):
                torch.testing.assert_close(scalars, expected, rtol=1e-4, atol=1e-5)
                assert [record["step"] for record in history] == [record["step"] for record in single]
                assert flips == share


def test_several_processes_that_were_asked_for_must_be_there() -> None:
    with pytest.raises(RuntimeError, match="distributed: there is one process only"):
        fitted(distributed=True)
    for alone in (None, False):
        with distributed.process_group(alone) as processes:
            assert processes == distributed.SINGLE_PROCESS


def test_work_is_split_without_loss() -> None:
    for size in (1, 2, 3, 7):
        parts = [distributed.ProcessGroup(rank, size).shard(range(5)) for rank in range(size)]
        assert sorted(itertools.chain(*parts)) == list(range(5))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        groups = [distributed.ProcessGroup(rank, size) for rank in range(size)]
        assert [group.is_rank_zero for group in groups] == [True] + [False] * (size - 1)
