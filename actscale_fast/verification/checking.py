"""One case on one backend: right, within its memory, the same bits twice, in a graph and on another stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..ops import backends, canary
from .accuracy import accuracy
from .case import Case
from .guarded_memory import Guard

Results = tuple[Tensor, ...]


class WrongError(Exception):
    """A kernel did not do what it should; the message says what it did."""


def check(case: Case, backend: backends.BackendName, device: torch.device) -> float:
    """Run a case on a backend and return the share of the allowed error that it took.

    Raises:
        WrongError: a result, a write outside of the outputs, or a difference between two runs.
    """
    with backends.use_backend(backend), canary.switched_off():
        if case.refused_row is not None:
            _check_refused(case, case.refused_row, device)
            return 0.0
        results = _guarded(case, device)
    share = _share_of_allowed_error(case, results)
    with backends.use_backend(backend), canary.switched_off():
        for how, run in _repetitions(device):
            _same_bits(how, results, run(case, device))
    return share


def _share_of_allowed_error(case: Case, results: Results) -> float:
    exact = case.exact()
    with backends.use_backend("reference"):
        baseline = case.call(*case.arguments)
    terms = None if case.terms is None else case.terms(*case.wide())
    found = accuracy(tuple(result.cpu() for result in results), exact, [baseline], terms)
    if found.reason:
        raise WrongError(found.reason)
    return found.error / found.allowed


def _guarded(case: Case, device: torch.device) -> Results:
    """The results, computed in poisoned memory between guard bands."""
    guard = Guard()
    arguments = case.on(device, guard)
    before = [value.clone() for value in arguments if isinstance(value, Tensor)]
    with guard.outputs():
        results = case.call(*arguments)
    results = tuple(result.clone() for result in results)
    broken = guard.broken()
    if broken:
        raise WrongError(f"{broken} bytes outside its tensors were written")
    _same_bits("arguments were changed:", tuple(before), tuple(v for v in arguments if isinstance(v, Tensor)))
    return results


def _check_refused(case: Case, row: int, device: torch.device) -> None:
    """Invalid values: an error where they can be read without waiting; elsewhere NaN in their row and nowhere else."""
    if device.type == "cpu":
        try:
            case.call(*case.on(device, Guard()))
        except (ValueError, IndexError):
            return
        raise WrongError("invalid arguments were accepted")
    right = case.call(*case.on(device, Guard(), valid=True))
    for index, (one, other) in enumerate(zip(_guarded(case, device), right, strict=True)):
        if one.dim() == 0 or len(one) != len(case.arguments[0]):  # not by row
            continue
        others = torch.arange(len(one), device=device) != row
        if not bool(one[row].isnan().all()):
            raise WrongError(f"tensor {index}: the row of an invalid argument is not NaN")
        _same_bits("rows of valid arguments have changed:", (one[others],), (other[others],))


def _repetitions(device: torch.device) -> Iterator[tuple[str, Callable[[Case, torch.device], Results]]]:
    yield "a second run differs:", lambda case, device: case.call(*case.on(device, Guard()))
    if device.type == "cuda":
        yield "the replay of a CUDA graph differs:", _replayed
        yield "a run on a second stream differs:", _on_a_stream
        if torch.cuda.device_count() > 1:
            yield "a run on a second device differs:", _on_another_device


def _replayed(case: Case, device: torch.device) -> Results:
    arguments = case.on(device, Guard())
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):  # kernels are compiled and workspaces allocated
            case.call(*arguments)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.call(*arguments)
    for result in results:  # what the capture left there is not a result
        result.detach().fill_(torch.nan if result.is_floating_point() else -1)
    graph.replay()
    torch.cuda.synchronize(device)
    return tuple(result.clone() for result in results)


def _on_a_stream(case: Case, device: torch.device) -> Results:
    arguments = case.on(device, Guard())
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        results = case.call(*arguments)
    stream.synchronize()
    return results


def _on_another_device(case: Case, device: torch.device) -> Results:
    """While the first device is the current one. Another model of GPU may split its sums otherwise."""
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    if torch.cuda.get_device_name(other) != torch.cuda.get_device_name(device):
        return _on_a_stream(case, device)
    return tuple(result.to(device) for result in case.call(*case.on(other, Guard())))


def _same_bits(how: str, first: Results, second: Results) -> None:
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        if one.shape != other.shape or not torch.equal(_bits(one), _bits(other)):
            raise WrongError(f"{how} tensor {index}")


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8) if x.numel() else x.new_empty(0, dtype=torch.uint8)
