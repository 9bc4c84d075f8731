"""Canaries: the first call of each kernel in a process is compared with the reference, on a part of its results.

The part is one row or one head, so that the comparison costs little. On a CPU it is made at once; on a GPU nothing
waits for it: the answer is read at a later call, when it has arrived. A kernel that fails is not used again in this
process: the reference serves its calls, and a warning says so. Nothing is compared, and no answer is read, while a CUDA
graph is captured.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, verdicts
from .interface import BackendModule, LossArguments

Key = tuple[str, str, torch.dtype, torch.device]  # backend, function, dtype and device of the first argument

#: Kernels that need no comparison any more. A GPU's are listed when the comparison has been queued.
passed: set[Key] = set()
#: Results of comparisons on their way from a GPU.
pending: list[_Pending] = []

#: For each result the size of the terms that it is the sum of; None: it is not compared in this call.
Terms = Sequence[Tensor | float | None]

#: Allowed error: of the largest value, and float32 roundings of the terms that a result is the sum of. A canary looks
#: for kernels that are wrong; how exact they are is for verification and the tests.
RELATIVE, ROUNDINGS = 1e-3, 64
#: Values of a parameter that an optimizer's step is compared on.
VALUES = 64
#: A logit so far below the largest has a probability of less than 1e-21.
NO_PROBABILITY = 50.0


_switch = {"on": True}
_lock = threading.RLock()  # backward passes run in threads of autograd's own


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Within it nothing is compared: verification does that itself, on whole results."""
    before, _switch["on"] = _switch["on"], False
    try:
        yield
    finally:
        _switch["on"] = before


@dataclass(frozen=True, eq=False)
class _Pending:
    key: Key
    op: str
    named: bool  # the backend was chosen by name when the kernel ran
    good: Tensor  # bool [], in pinned memory
    event: torch.cuda.Event


@dataclass(frozen=True)
class _Part:
    """Where a function's part lies: for each argument and result the axis that is cut to its first entries, or None."""

    arguments: tuple[int | None, ...]
    results: tuple[int | None, ...]
    terms: Callable[[_Call, BackendModule], Terms]
    length: int = 1
    last: bool = False  # cut to the last entry instead: labels often leave out the first rows
    in_place: bool = False  # the results are the first arguments
    says_nothing: Callable[[_Call], bool] | None = None  # whether the part's results are 0 whatever the kernel does

    def cut(self, values: Sequence[Any], axes: Sequence[int | None]) -> tuple[Any, ...]:
        return tuple(
            value.narrow(axis, value.shape[axis] - 1 if self.last else 0, min(self.length, value.shape[axis]))
            if isinstance(value, Tensor) and axis is not None and value.dim() and value.numel()
            else value
            for value, axis in zip(values, [*axes, *[None] * (len(values) - len(axes))], strict=True)
        )


@dataclass(frozen=True)
class _Call:
    """A call of `name` on the part."""

    name: str
    arguments: tuple[Any, ...]


def watched(
    backend: str, name: str, op: str, function: Callable[..., Any], reference: BackendModule,
    arguments: tuple[Any, ...], options: dict[str, Any],
) -> Any:  # fmt: skip
    """The results of the call; compared with the reference where that can be done now.

    Raises:
        RuntimeError: on a CPU, a kernel that changes its arguments in place gave wrong results; or the backend was
            chosen by name.
    """
    first, part = arguments[0], _PARTS[name]
    own = function is getattr(reference, name)  # the backend has no kernel of its own for this
    if own or not _switch["on"] or first.numel() == 0 or _is_capturing(first.device):
        return function(*arguments, **options)
    call = _Call(name, part.cut(arguments, part.arguments))
    if part.says_nothing is not None and part.says_nothing(call):
        return function(*arguments, **options)
    key = (backend, name, first.dtype, first.device)
    # What NaN or an overflow makes of a result differs between right ways to compute it. Asked before the call, which
    # may overwrite its arguments.
    ordinary = _are_ordinary(call, part)
    with torch.autocast(first.device.type, enabled=False):
        terms = part.terms(call, reference)
        copies = call.arguments
        if part.in_place:
            copies = tuple(value.clone() if isinstance(value, Tensor) else value for value in copies)
        expected = _as_tuple(getattr(reference, name)(*copies))
    results = function(*arguments, **options)
    if part.in_place:
        expected, got = copies[: len(part.results)], call.arguments[: len(part.results)]
    else:
        got = part.cut(_as_tuple(results), part.results)
    compared = [one for one in zip(got, expected, terms, strict=True) if one[2] is not None]
    good = torch.stack([_agree(*one) for one in compared]).all()  # type: ignore[arg-type]
    named = backends.get_backend() != "auto"
    if first.is_cuda:
        passed.add(key)  # so that only the first call is compared
        _queue(key, op, named, good | ~ordinary)
        return results
    if not bool(ordinary):
        return results  # compared at a later call
    if bool(good):
        passed.add(key)
        return results
    distrust(key, op, named=named)
    if part.in_place or options.get("in_place"):
        raise RuntimeError(f"{name}: the {backend} kernel has changed its arguments wrongly; see the warning")
    return getattr(reference, name)(*arguments, **options)


def _are_ordinary(call: _Call, part: _Part) -> Tensor:
    """Whether the part's inputs are finite, bool []; logits may be −inf."""
    masked = call.name == "intervention_loss"
    finite = [
        (value < torch.inf).all() if masked else value.isfinite().all()
        for value, axis in zip(call.arguments, part.arguments, strict=False)
        if axis is not None and isinstance(value, Tensor) and value.is_floating_point()
    ]
    return torch.stack(finite).all()


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _queue(key: Key, op: str, named: bool, good: Tensor) -> None:
    """Let the answer come to the host without a wait."""
    kept = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True).copy_(good, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(good.device))
    with _lock:
        pending.append(_Pending(key, op, named, kept, event))


def collect(*, wait: bool = False) -> None:
    """Read the answers that have arrived, or all of them if `wait`; none while a CUDA graph is captured.

    Raises:
        RuntimeError: a kernel failed whose backend had been chosen by name.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return  # asking for an event would end the capture
    with _lock:
        arrived = []
        for one in pending:
            if wait:
                one.event.synchronize()
            if one.event.query():
                arrived.append(one)
        pending[:] = [one for one in pending if one not in arrived]
    for one in arrived:
        if not bool(one.good):
            distrust(one.key, one.op, named=one.named)


def distrust(key: Key, op: str, *, named: bool = False) -> None:
    """Let the reference serve this op in this dtype on this device from now on, and say so.

    Raises:
        RuntimeError: the backend was chosen by name (`named`), so nothing may take its place.
    """
    backend, name, dtype, device = key
    passed.discard(key)
    if named:
        raise RuntimeError(
            f"{name}: the {backend} kernel disagrees with plain PyTorch for {dtype} on {device}, so backend "
            f"{backend!r} cannot be used for it; `actscale-fast verify` tests all kernels"
        )
    verdicts.distrusted.add((device.type, device.index, op, dtype))
    backends.reconsider()
    warnings.warn(
        f"{name}: the {backend} kernel disagrees with plain PyTorch for {dtype} on {device}, which serves these calls "
        "from now on; results so far may be wrong. `actscale-fast verify` tests all kernels.",
        RuntimeWarning,
        stacklevel=3,
    )


def _agree(got: Tensor, expected: Tensor, terms: Tensor | float) -> Tensor:
    """Whether two results are equal up to rounding, bool []; NaN and ±inf must stand in the same places."""
    limits = torch.finfo(got.dtype)
    # Subnormal numbers are rounded to multiples of the smallest one, or in float32 to 0.
    eps, floor = limits.eps, limits.tiny * (1.0 if got.dtype == torch.float32 else 2 * limits.eps)
    got, expected = got.detach().double(), expected.detach().double()
    if got.shape != expected.shape or not got.numel():
        return torch.full((), got.shape == expected.shape, device=got.device)
    finite = expected.isfinite()
    special = (got == expected) | (got.isnan() & expected.isnan())
    size = expected.where(finite, torch.zeros_like(expected)).abs().amax()
    summed = terms.double() if isinstance(terms, Tensor) else terms
    allowed = (RELATIVE + 2 * eps) * size + ROUNDINGS * torch.finfo(torch.float32).eps * summed + floor
    return torch.where(finite, (got - expected).abs() <= allowed, special).all()


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def _largest(value: Tensor) -> Tensor | float:
    return value.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().amax() if value.numel() else 0.0


def _magnitudes(call: _Call, reference: BackendModule) -> Terms:
    """Of results that are sums of products: the same call on the arguments' magnitudes."""
    sizes = (a.abs() if isinstance(a, Tensor) and a.is_floating_point() else a for a in call.arguments)
    sizes = (abs(a) if isinstance(a, float) else a for a in sizes)
    return [_largest(value) for value in _as_tuple(getattr(reference, call.name)(*sizes))]


def _spread_of_logits(call: _Call, reference: BackendModule) -> Terms:
    """Of the losses: what a logit's rounding moves them by is its own size times the inverse temperature.

    Columns far below the largest one have no probability; masks are often the least finite number.
    """
    loss = LossArguments(*call.arguments)
    sizes = []
    for side in (loss.logits, loss.reference_logits):
        wide = side.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        counted = wide > wide.amax(-1, keepdim=True) - NO_PROBABILITY
        sizes.append(wide.where(counted, torch.zeros_like(wide)).abs().amax())
    size = (1 + sizes[0] + sizes[1]) * max(1.0, loss.inverse_temperature)
    for weight in (loss.row_weight, loss.gradient_weight):
        size = size if weight is None else size * (1 + weight.abs().amax())
    return [size, size, size, None if loss.correct is None else size, 0.0, 0.0]


def _size_of_products(call: _Call, reference: BackendModule) -> Terms:
    """Of a softmax over W·h: the largest sum of magnitudes that makes a logit."""
    hidden, weight, bias, *_, logit_scale, _ = call.arguments
    norms = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).amax() for x in (hidden, weight)]
    size = norms[0] * norms[1] * logit_scale + (0.0 if bias is None else bias.abs().amax())
    if hidden.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        size = size * (2.0**-10 / (ROUNDINGS * torch.finfo(torch.float32).eps))
    size, largest = 1 + size, weight.abs().amax()
    # The reference rounds its probabilities to the dtype before the product that makes the mean.
    rounded = torch.finfo(weight.dtype).eps / (ROUNDINGS * torch.finfo(torch.float32).eps)
    return [size, (size + 2 * rounded) * largest, None if bias is None else size, size]


def _of_adam(call: _Call, reference: BackendModule) -> Terms:
    """The moved parameter is a difference of itself, the step and the threshold."""
    parameter, gradient, exp_avg, exp_avg_sq, _, lr, _, _, _, l1 = call.arguments
    sizes = [value.abs().amax() for value in (parameter, gradient, exp_avg, exp_avg_sq)]
    return [sizes[0] + lr * (10 + l1), None, sizes[1] + sizes[2], sizes[1] ** 2 + sizes[3], None]


def _nothing(call: _Call, reference: BackendModule) -> Terms:
    return [0.0] * len(_PARTS[call.name].results)


def _has_no_weight(call: _Call) -> bool:
    """On a CPU, where it can be read; on a GPU the comparison of zeros is made."""
    weight = LossArguments(*call.arguments).row_weight
    return weight is not None and not weight.is_cuda and not bool(weight.any())


_BY_ROW = ("logits", "reference_logits", "correct", "wrong", "direction", "row_weight", "gradient_weight")
_ROWS_OF_LOSS = tuple(0 if name in _BY_ROW else None for name in LossArguments._fields)
#: Head 0; the first channels; row 0; the first values of a parameter.
_PARTS = {
    "scale_heads": _Part((2, 2, 2), (2,), _magnitudes),
    "scale_heads_backward": _Part((2, 2, 2, 2), (2, 2, 2), _magnitudes),
    "dynamic_scale": _Part((2, 1, 1), (2, 2), _magnitudes),
    "dynamic_scale_backward": _Part((2, 2, 2, 1, 2), (2, 1, 1), _magnitudes),
    "scale_channels": _Part((-1, 0), (-1,), _magnitudes, length=VALUES),
    "scale_channels_backward": _Part((-1, -1, 0), (-1, 0), _magnitudes, length=VALUES),
    "intervention_loss": _Part(
        _ROWS_OF_LOSS, (0, 0, 0, 0, None, None), _spread_of_logits, last=True, says_nothing=_has_no_weight
    ),
    "intervention_loss_scale_": _Part((0, 0, 0, 0, 0, 0), (0,), _nothing, in_place=True),
    "proximal_adam_": _Part((0, 0, 0, 0, None), (0, None, 0, 0, None), _of_adam, length=VALUES, in_place=True),
    "linear_softmax": _Part((0, None, None, 0, 0), (0, 0, 0, 0), _size_of_products),
}
