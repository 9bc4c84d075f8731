"""Shared fixtures: seeds, backends, poisoned memory.

Without a GPU the Triton kernels run in Triton's interpreter, which is chosen by an environment variable read when
Triton is imported; torch.compile imports it too (and compiles for the CPU as usual with the variable set).
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

#: A verdict of this machine must not choose the backends of the tests: a folder that is not there.
os.environ["ACTSCALE_VERDICTS"] = str(Path(__file__).resolve().parent / "no_verdicts")
os.environ["ACTSCALE_VERIFY"] = "0"

#: A Python that a test starts finds the installed package, with its compiled kernels, not the sources in its folder.
os.environ["PYTHONSAFEPATH"] = "1"

#: `benchmarks` stands beside the tests; last in the path, so that an installed actscale_fast comes before this one.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import random
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from cuda_emulation.emulation import emulated_backend
from op_cases import Backend, Inputs
from triton_interpreter import remember_lookups

from actscale_fast.ops import backends

#: `make test-vllm` collects this folder, in an environment that has vLLM.
collect_ignore = ["vllm_plugin"]

#: The seed of every run that does not ask for another one.
DEFAULT_SEED = 20241004


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--random-seeds",
        action="store_true",
        help="draw fresh random inputs; the seed is printed, and ACTSCALE_TEST_SEED=<seed> repeats the run",
    )
    parser.addoption(
        "--fast",
        action="store_true",
        help="one case of each test, and none that is slow, needs the real model or much memory",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--random-seeds"):
        # An environment variable, so that the worker processes of pytest-xdist draw the same inputs.
        os.environ.setdefault("ACTSCALE_TEST_SEED", str(random.SystemRandom().randrange(2**31)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --fast, a part of the tests. Files with slow tests come first, so that no process is left alone with one."""
    if config.getoption("--fast"):
        kept = fast_part(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    n_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -n_slow[item.path])


def pytest_collection_finish() -> None:
    """What was imported stays until the end; the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def fast_part(items: list[pytest.Item]) -> set[pytest.Item]:
    """One case of each test, which its name chooses, so that all together cover every backend and family."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("slow", "real_model", "large")):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {found[zlib.crc32(name.encode()) % len(found)] for name, found in cases.items()}


def run_seed() -> int:
    return int(os.environ.get("ACTSCALE_TEST_SEED", DEFAULT_SEED))


def pytest_report_header() -> str:
    return f"inputs: ACTSCALE_TEST_SEED={run_seed()}; ACTSCALE_BACKEND={os.environ.get('ACTSCALE_BACKEND', 'auto')}"


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ops and kernels run on two threads, so that parts meet at their edges; the Makefile gives other tests one."""
    before = torch.get_num_threads()
    if request.path.parent.name in ("ops", "kernels"):
        torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def demo_model() -> tuple[Any, Any]:
    """The real model of the demo and its tokenizer, loaded once for all tests, which leave it as it was."""
    from actscale_fast import load_demo_model

    return load_demo_model(progress=False)


@pytest.fixture
def unchecked_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits begin without their gradient check, which takes longer than a few steps of a tiny model.

    For tests of something else. A shortcut that is wrong shows in them: with the check it would be left out.
    """
    from actscale_fast.learning.engine import Engine

    monkeypatch.setattr(Engine, "_gradient_check", lambda self: None)


@pytest.fixture
def inputs(request: pytest.FixtureRequest) -> Inputs:
    """Random inputs of this test's own: seeded by the run's seed and the test's name, printed when the test fails."""
    seed = zlib.crc32(f"{run_seed()} {request.node.name}".encode())
    print(f"ACTSCALE_TEST_SEED={run_seed()} ({request.node.name}: {seed})")
    return Inputs(torch.Generator().manual_seed(seed))


def quicken_interpreter() -> None:
    if backends.triton_interpreted() and "ptx.plugin" not in sys.modules:  # real PTX is compiled
        remember_lookups()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The backend named by the parameter, chosen for the test; skipped with the reason where it cannot run.

    Without a GPU the CUDA backend runs on an emulated device, on CPU tensors.
    """
    name = request.param
    if name == "cuda" and not torch.cuda.is_available():
        with emulated_backend():
            yield Backend(name, torch.device("cpu"))
        return
    reason = backends.unavailable(name)
    if reason:
        pytest.skip(f"backend {name!r}: {reason}")
    if name == "triton":
        quicken_interpreter()
    on_gpu = name in ("triton", "cuda") and torch.cuda.is_available()
    with backends.use_backend(name):
        yield Backend(name, torch.device("cuda" if on_gpu else "cpu"))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills what torch.empty, empty_like and new_empty return with NaN: nothing unwritten passes for a result."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(3).bfloat16()).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.fixture
def device() -> torch.device:
    """Where the Triton kernels run: the GPU, or the CPU in Triton's interpreter."""
    if torch.cuda.is_available() and not backends.triton_interpreted():
        return torch.device("cuda")
    if not backends.triton_interpreted():
        pytest.skip("no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)")
    quicken_interpreter()
    return torch.device("cpu")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """In the interpreter, tiles of 64 columns instead of 2048 and one multiprocessor: short rows have many tiles, up to
    three rows are split over programs, and four fill the chip."""
    if device.type == "cpu":
        from actscale_fast.ops.triton import columns

        monkeypatch.setattr(columns, "THREADS_PER_WARP", 1)
        for name in ("intervention_loss", "intervention_loss_scale"):
            module = importlib.import_module(f"actscale_fast.ops.triton.{name}")
            monkeypatch.setattr(module, "processors", lambda device: 1)
