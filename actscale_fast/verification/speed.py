"""How long the backends take for calls of three sizes, with the gradients, in turns."""

from __future__ import annotations

import contextlib
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import ops
from ..ops import backends, verdicts
from .case import Inputs

#: Shapes of small, medium and large calls (`verdicts.SIZES`): one token and batches of GPT-2's heads; rows of logits;
#: hidden states and a vocabulary; parameters.
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "scale_heads": ((1, 1, 12, 64), (16, 24, 12, 64), (32, 128, 12, 64)),
    "dynamic_scale": ((1, 1, 12, 64), (16, 24, 12, 64), (32, 128, 12, 64)),
    "scale_channels": ((1, 1, 768), (16, 24, 768), (32, 128, 768)),
    "intervention_loss": ((2, 8192), (16, 49152), (64, 49152)),
    "linear_softmax": ((16, 64, 8192), (64, 576, 16384), (2048, 576, 4096)),
    "proximal_adam_": ((270,), (100_000,), (2_000_000,)),
}
#: Seconds per variant and size, in a quick and in a full measurement, and samples at least.
QUICK, FULL = 0.06, 0.5
QUICK_ROUNDS, FULL_ROUNDS = 4, 7
#: A sample lasts at least this long.
SAMPLE_SECONDS = 2e-3
#: Name of the variant that is plain PyTorch compiled.
COMPILED = "torch.compile"

Step = Callable[[], object]


def microseconds(
    op: str, dtype: torch.dtype, size: int, names: Sequence[str], device: torch.device, *, quick: bool
) -> dict[str, dict[str, float]]:
    """For each name (a backend, "cpu" and a level, or `COMPILED`) the times of one call with its gradients, in µs.

    `step` is what a call adds to a queue of calls, the larger of host and device time; its median and the middle 60 %
    of the samples. On a GPU `host` is the time until the call returns, and in a full measurement `device` is that of a
    replayed CUDA graph with the L2 cache overwritten before.
    """
    steps = {name: _step(op, dtype, size, name, device) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    repeats = {}
    for name, step in steps.items():
        with _chosen(name):
            step()
            taken = _queue(step, 2, device)
            repeats[name] = max(1, min(100, int(SAMPLE_SECONDS / taken)))
    budget, rounds = (QUICK, QUICK_ROUNDS) if quick else (FULL, FULL_ROUNDS)
    started = time.perf_counter()
    while min(map(len, samples.values())) < rounds or time.perf_counter() - started < budget * len(names):
        for name, step in steps.items():
            with _chosen(name):
                samples[name].append(_queue(step, repeats[name], device))
    result = {}
    for name, step in steps.items():
        fifths = statistics.quantiles(samples[name], n=5, method="inclusive")
        times = {"step": statistics.median(samples[name]), "low": fifths[0], "high": fifths[-1]}
        if device.type == "cuda":
            with _chosen(name):
                times["host"] = _host(step, repeats[name], device)
                if not quick:
                    times["device"] = _device(step, device)
        result[name] = {key: round(1e6 * value, 2) for key, value in times.items()}
    return result


@contextlib.contextmanager
def _chosen(name: str) -> Iterator[None]:
    backend, _, level = name.partition(" ")
    with backends.use_backend("reference" if name == COMPILED else backend):  # type: ignore[arg-type]
        if not level:
            yield
            return
        importlib.import_module("actscale_fast.ops.cpu")  # applies the environment's level at first
        extension = importlib.import_module("actscale_fast.ops._C")
        before = extension.level()
        extension.set_level(level)
        try:
            yield
        finally:
            extension.set_level(before)


def _step(op: str, dtype: torch.dtype, size: int, name: str, device: torch.device) -> Step:
    inputs = Inputs(0, dtype)
    function, arguments = _MAKERS[op](inputs, SHAPES[op][size])
    arguments = tuple(value.to(device) for value in arguments)
    if name == COMPILED:
        function = torch.compile(function, dynamic=False)
    return functools.partial(function, *arguments)


def _scaling(op: str, inputs: Inputs, shape: tuple[int, ...]) -> tuple[Callable[..., object], tuple[Tensor, ...]]:
    """x, and one scalar per head, a probe per head, or a factor per channel."""
    function = getattr(ops, op)
    sizes = {"scale_heads": (1, 1, shape[2]), "dynamic_scale": shape[2:], "scale_channels": shape[-1:]}[op]

    def step(x: Tensor, parameter: Tensor, upstream: Tensor) -> object:
        x, parameter = x.detach().requires_grad_(), parameter.detach().requires_grad_()
        return torch.autograd.grad(function(x, parameter), (x, parameter), upstream)

    return step, (inputs.activations(*shape), inputs.normal(*sizes), inputs.activations(*shape))


def _intervention_loss(inputs: Inputs, shape: tuple[int, ...]) -> tuple[Callable[..., object], tuple[Tensor, ...]]:
    rows, width = shape
    correct = inputs.integers(width, rows)
    direction = 1.0 - 2.0 * (torch.arange(rows) % 2).float()

    def step(z: Tensor, r: Tensor, correct: Tensor, wrong: Tensor, direction: Tensor, upstream: Tensor) -> object:
        z = z.detach().requires_grad_()
        losses = ops.intervention_loss(z, r, correct, wrong, direction=direction)
        return torch.autograd.grad(losses, z, (upstream, upstream))

    logits = (inputs.activations(rows, width, scale=3.0), inputs.activations(rows, width, scale=3.0))
    return step, (*logits, correct, (correct + 1) % width, direction, torch.ones(rows))


def _linear_softmax(inputs: Inputs, shape: tuple[int, ...]) -> tuple[Callable[..., object], tuple[Tensor, ...]]:
    rows, width, vocab = shape
    correct = inputs.integers(vocab, rows)
    direction = 1.0 - 2.0 * (torch.arange(rows) % 2).float()

    def step(h: Tensor, weight: Tensor, correct: Tensor, wrong: Tensor, direction: Tensor) -> object:
        leaf = h.detach().requires_grad_()
        with torch.no_grad():
            reference = ops.reference_statistics(h, weight, correct, wrong)
        losses = ops.linear_intervention_loss(leaf, weight, reference, correct, wrong, direction=direction)
        return torch.autograd.grad(losses[0].sum() + losses[1].sum(), leaf)

    hidden, weight = inputs.activations(rows, width), inputs.activations(vocab, width, scale=2 * width**-0.5)
    return step, (hidden, weight, correct, (correct + 1) % vocab, direction)


def _proximal_adam(inputs: Inputs, shape: tuple[int, ...]) -> tuple[Callable[..., object], tuple[Tensor, ...]]:
    def step(*state: Tensor) -> object:
        return ops.proximal_adam_(*state, lr=1e-3, l1=1e-4)

    return step, (*(inputs.normal(*shape) for _ in range(3)), inputs.normal(*shape).abs(), torch.zeros(()))


_MAKERS: dict[str, Callable[[Inputs, tuple[int, ...]], tuple[Callable[..., object], tuple[Tensor, ...]]]] = {
    **{op: functools.partial(_scaling, op) for op in ("scale_heads", "dynamic_scale", "scale_channels")},
    "intervention_loss": _intervention_loss,
    "linear_softmax": _linear_softmax,
    "proximal_adam_": _proximal_adam,
}
assert set(_MAKERS) == set(SHAPES) == set(verdicts.OPS)


def _queue(step: Step, count: int, device: torch.device) -> float:
    """Seconds per call of `count` calls that the host does not wait for one by one."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    _wait(device)
    return (time.perf_counter() - start) / count


def _host(step: Step, count: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(min(count, 10)):  # few enough that the queue does not fill
        step()
    taken = (time.perf_counter() - start) / min(count, 10)
    _wait(device)
    return taken


def _device(step: Step, device: torch.device) -> float:
    """Median seconds of a replayed graph, by events, the L2 cache overwritten before each replay."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    flush = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    pairs = []
    for _ in range(20):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        pairs.append((start, end))
    _wait(device)
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
