"""The clocks. All variants of a setting are timed in turns, in a new order each round, so that drift hits them alike.

On a CPU there is one clock, `call`: the wall time of one call, buffers as the turns leave them in the caches.
On a GPU there are three, because they answer three questions:
    device  what the kernels take: CUDA events around a replayed graph (around the call where it cannot be captured),
            with rotated buffers and the L2 cache overwritten before each sample;
    call    what one call takes with the host waiting for it: dispatch, launches and kernels;
    step    what one call adds to a queue of many: the larger of host and device time, as in a training loop.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from actscale_fast import ops

from .case import Variant

#: A sample lasts at least this long, so that reading the clock (0.1 µs) and one interruption weigh little.
SAMPLE_SECONDS = 2e-3
#: A call longer than this is warm after one.
LONG = 1.0
#: A call that takes a GPU longer than this is not captured: the gaps between its launches are nothing beside it, and a
#: graph would keep the call's memory to the end (eager PyTorch's losses of 8192 × 262144 logits: seven times 8.6 GB).
UNCAPTURED = 5e-3


@dataclass(frozen=True)
class Budget:
    """How long a variant is measured: rounds until `seconds` are spent on it, within the two bounds."""

    seconds: float
    fewest: int
    most: int

    def rounds(self, sample_seconds: float) -> int:
        return max(self.fewest, min(self.most, round(self.seconds / max(sample_seconds, 1e-9))))


FULL = Budget(seconds=3.0, fewest=7, most=200)
QUICK = Budget(seconds=0.3, fewest=3, most=20)


@dataclass(frozen=True)
class Times:
    """Seconds a call: the median and the middle 60 % of the samples."""

    median: float
    low: float  # 20th percentile
    high: float  # 80th percentile
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0], len(samples))
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[3], len(samples))


#: One variant over all copies of the inputs: variants[i] works on copy i.
Rotated = Sequence[Variant]
Sampler = Callable[[Rotated], float]


@contextmanager
def chosen_backend(variant: Variant) -> Iterator[None]:
    """The variant's backend, set outside of what is timed."""
    if variant.backend is None:
        yield
    else:
        with ops.use_backend(variant.backend):  # type: ignore[arg-type]
            yield


def in_turns(variants: Sequence[Rotated], sample: Sampler, budget: Budget) -> list[Times]:
    """Times of each variant from samples taken in turns."""
    slowest = 0.0
    for rotated in variants:  # warm: compiles, allocates, settles the caches
        with chosen_backend(rotated[0]):
            for _ in range(2):
                start = time.perf_counter()
                sample(rotated)
                taken = time.perf_counter() - start
                if taken > LONG:
                    break
            slowest = max(slowest, taken)
    samples: list[list[float]] = [[] for _ in variants]
    order = list(range(len(variants)))
    shuffle = random.Random(0).shuffle
    for _ in range(budget.rounds(slowest)):
        shuffle(order)
        for index in order:
            with chosen_backend(variants[index][0]), _no_collection():
                samples[index].append(sample(variants[index]))
    return [Times.of(taken) for taken in samples]


class WallClock:
    """Wall seconds a call on the CPU; short calls are repeated until the sample is long enough."""

    def __init__(self) -> None:
        self._repeats: dict[str, int] = {}

    def __call__(self, rotated: Rotated) -> float:
        variant = rotated[0]
        if variant.name not in self._repeats:
            for _ in range(2):  # the second call is warm
                start = time.perf_counter()
                variant.call()
                taken = time.perf_counter() - start
                if taken > LONG:
                    break
            self._repeats[variant.name] = 1 + int(SAMPLE_SECONDS / taken)
            if taken > LONG:
                return taken
        repeats = self._repeats[variant.name]
        start = time.perf_counter()
        for _ in range(repeats):
            variant.call()
        return (time.perf_counter() - start) / repeats


class CallClock:
    """Wall seconds of one call on a GPU with the host waiting before and after."""

    def __call__(self, rotated: Rotated) -> float:
        total = 0.0
        for variant in rotated:
            torch.cuda.synchronize()
            start = time.perf_counter()
            variant.call()
            torch.cuda.synchronize()
            total += time.perf_counter() - start
        return total / len(rotated)


class StepClock:
    """Wall seconds a call in a queue of calls that the host does not wait for; fewer of those that take long."""

    def __init__(self, longest: int = 50) -> None:
        self.longest = longest
        self._lengths: dict[str, int] = {}

    def __call__(self, rotated: Rotated) -> float:
        name = rotated[0].name
        if name not in self._lengths:
            taken = self._queue(rotated, 2)
            self._lengths[name] = max(2, min(self.longest, int(LONG / taken)))
        return self._queue(rotated, self._lengths[name])

    @staticmethod
    def _queue(rotated: Rotated, length: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for index in range(length):
            rotated[index % len(rotated)].call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / length


class DeviceClock:
    """Device seconds of one call, by CUDA events around a replayed graph, the L2 cache overwritten before each."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(4 * size, dtype=torch.uint8, device=device)
        self._replays: dict[str, list[Callable[[], object]]] = {}
        self.captured: dict[str, bool] = {}

    def __call__(self, rotated: Rotated) -> float:
        name = rotated[0].name
        if name not in self._replays:
            self._replays[name] = self._capture(rotated)
        pairs = []
        for replay in self._replays[name]:
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / len(pairs) / 1e3

    def _capture(self, rotated: Rotated) -> list[Callable[[], object]]:
        name = rotated[0].name
        if _device_seconds(rotated[0].call) > UNCAPTURED:
            self.captured[name] = False
            return [variant.call for variant in rotated]
        try:
            graphs: list[Callable[[], object]] = []
            for variant in rotated:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(3):
                        variant.call()
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    variant.call()
                graphs.append(graph.replay)
            self.captured[name] = True
            return graphs
        except RuntimeError:  # it synchronises with the host: events around the call itself, dispatch gaps included
            torch.cuda.synchronize()
            self.captured[name] = False
            return [variant.call for variant in rotated]


def _device_seconds(call: Callable[[], object]) -> float:
    """Seconds between two events around the second of two calls."""
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
