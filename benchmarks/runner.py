"""Runs a case: checks every variant against float64, times those that pass in turns, and returns a plain record."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from actscale_fast.verification.accuracy import accuracy

from . import counting, machine, memory, timing
from .case import Case, Problem, Setting, Variant

COPY = "copy"  # the yardstick: as many bytes as the setting must move, moved by Tensor.copy_ in the same turns


def run_case(
    case: Case,
    device: torch.device,
    *,
    quick: bool = False,
    only: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The record of a case, ready for JSON: of the settings that run on this type of device.

    Args:
        quick: only the settings marked quick, few samples.
        only: names of variants to run beside the baseline; all where empty.
    """
    settings = [s for s in case.settings if device.type in s.devices and (s.quick or not quick)]
    record: dict[str, Any] = {
        "case": case.name, "title": case.title, "unit": case.unit, "bandwidth": case.bandwidth, "counted": case.counted,
        "quick": quick,
        "machine": machine.slug(device, torch.get_num_threads()), "environment": machine.environment(device),
        "settings": [],
    }  # fmt: skip
    for setting in settings:
        start = time.perf_counter()
        record["settings"].append(_run_setting(setting, device, case, timing.QUICK if quick else timing.FULL, only))
        say(f"{case.name}: {setting.label} ({time.perf_counter() - start:.0f} s)")
        gc.collect()
    return record


def _run_setting(
    setting: Setting, device: torch.device, case: Case, budget: timing.Budget, only: Sequence[str]
) -> dict[str, Any]:
    problem = setting.make(device)
    if case.fewest_samples is not None:
        budget = dataclasses.replace(budget, fewest=min(budget.fewest, case.fewest_samples))
    with problem.resources:
        return _measured(problem, setting, device, case, budget, only)


def _measured(
    problem: Problem, setting: Setting, device: torch.device, case: Case, budget: timing.Budget, only: Sequence[str]
) -> dict[str, Any]:
    variants = [v for i, v in enumerate(problem.variants) if i == 0 or not only or v.name in only]
    results, accepted = _check(problem, variants)
    problems = [problem, *(setting.make(device) for _ in range(_copies(problem, device) - 1))]
    rotated = [[_named(p, name) for p in problems] for name in accepted]
    if case.bandwidth:
        rotated.append([_copy(problem, device) for _ in problems])
    clocks = _clocks(device, case)
    for clock, sampler in clocks.items():
        for turns, times in zip(rotated, timing.in_turns(rotated, sampler, budget), strict=True):
            name = turns[0].name
            values = {"median": times.median, "low": times.low, "high": times.high, "samples": times.samples}
            results.setdefault(name, {"name": name, "status": "yardstick"})
            results[name].setdefault("seconds", {})[clock] = values
            if isinstance(sampler, timing.DeviceClock):
                results[name]["graph"] = sampler.captured[name]
    for name in accepted:
        with timing.chosen_backend(_named(problem, name)):
            call = _named(problem, name).call
            results[name]["peak_bytes"] = memory.peak_bytes(call, device)
            if case.counted and not name.startswith("torch.compile"):
                counts = counting.counted(call)
                results[name] |= {"kernels": counts.kernels, "moved_bytes": counts.n_bytes}
    main = next(iter(clocks))
    _ratios(results, problem, main)
    return {
        "label": setting.label, "note": setting.note, "bytes": problem.n_bytes, "flops": problem.flops, "clock": main,
        "variants": list(results.values()),
    }  # fmt: skip


def _check(problem: Problem, variants: Sequence[Variant]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What each variant's results are worth, and the names of those that may be timed."""
    exact, terms = problem.exact(), problem.terms() if problem.terms else None
    baselines: list[tuple[torch.Tensor, ...]] = []
    results: dict[str, dict[str, Any]] = {}
    for variant in variants:
        entry: dict[str, Any] = {"name": variant.name, "status": "ok" if variant.checked else "yardstick"}
        results[variant.name] = entry
        if not variant.checked:
            continue
        try:
            with timing.chosen_backend(variant):
                got = tuple(result.clone() for result in variant.call())
        except Exception as error:  # a rival that does not run here is a line of the table, not the end of it
            if not baselines:
                raise
            reason = str(error).splitlines()[0][:120] if str(error) else ""
            entry["status"] = f"failed: {type(error).__name__}: {reason}"
            continue
        if variant.name.startswith("eager"):
            baselines.append(got)
        found = accuracy(got, exact, baselines, terms, problem.dtype)
        entry["error"], entry["error_allowed"] = found.error, found.allowed
        if found.reason:
            entry["status"] = f"wrong: {found.reason}"
    return results, [name for name, entry in results.items() if entry["status"] in ("ok", "yardstick")]


def _named(problem: Problem, name: str) -> Variant:
    return next(variant for variant in problem.variants if variant.name == name)


def _copies(problem: Problem, device: torch.device) -> int:
    """Copies of the inputs to rotate through: on a GPU twice its L2 cache in all, at most 8."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(8, -(-2 * l2 // max(problem.n_bytes, 1))))


def _copy(problem: Problem, device: torch.device) -> Variant:
    source = torch.ones(max(problem.n_bytes // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Variant(COPY, lambda: (target.copy_(source),), checked=False)


def _clocks(device: torch.device, case: Case) -> dict[str, timing.Sampler]:
    """The first one is what the table's ratios are taken from."""
    if device.type != "cuda":
        return {"call": timing.WallClock()}
    make: dict[str, Callable[[], timing.Sampler]] = {
        "device": lambda: timing.DeviceClock(device), "call": timing.CallClock, "step": timing.StepClock,
    }  # fmt: skip
    return {name: make[name]() for name in case.clocks}


def _ratios(results: dict[str, dict[str, Any]], problem: Problem, clock: str) -> None:
    def median(name: str) -> float | None:
        return results[name]["seconds"][clock]["median"] if "seconds" in results.get(name, {}) else None

    for name, entry in results.items():
        own = median(name)
        if own is None:
            continue
        entry["gb_per_s"] = problem.n_bytes / own / 1e9
        for other, key in (("eager", "times_eager"), ("torch.compile", "times_compile"), (COPY, "share_of_copy")):
            theirs = median(other)
            if theirs is not None and name not in (other, COPY):
                entry[key] = theirs / own
