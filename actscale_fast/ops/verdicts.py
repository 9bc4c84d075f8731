"""Verdicts: which kernels passed verification on this device, and which backend is fastest there.

A verdict is a sealed JSON file in `folder()`, made by `actscale-fast verify`; one that comes with a release has
the same form and lies in `shipped_verdicts`. It holds for exactly the facts of `device_identity.identity`. `auto` reads
a device's verdict once and then looks up one dictionary.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._cache import default_cache_dir
from .._json import read_sealed, write_sealed
from .._log import notice
from . import device_identity

FORMAT = 1
SHIPPED = Path(__file__).resolve().parent / "shipped_verdicts"
#: The ops that a backend is chosen for. A backward pass belongs to its forward op.
OPS = ("scale_heads", "dynamic_scale", "scale_channels", "intervention_loss", "linear_softmax", "proximal_adam_")
#: Elements of an op's first argument: up to the first bound a call is small, up to the second medium, above it large.
SIZES = ("small", "medium", "large")
BOUNDS = (1 << 15, 1 << 20)
LARGE = len(SIZES) - 1


class Choice(NamedTuple):
    """What serves an op in a dtype on a device."""

    fastest: tuple[str, str, str]  # by size class
    passed: tuple[str, ...]  # kernel backends that passed
    level: str | None = None  # of the C++ kernels, where one that needs a verdict is right and faster


Choices = dict[tuple[str, torch.dtype], Choice]


def size_class(elements: int) -> int:
    """The index into `SIZES` of a call whose first argument has this many elements."""
    return (elements > BOUNDS[0]) + (elements > BOUNDS[1])


def folder() -> Path:
    """Where verdicts are kept: `$ACTSCALE_VERDICTS` if it is set, else `verdicts` in the cache folder."""
    chosen = os.environ.get("ACTSCALE_VERDICTS")
    return Path(chosen).expanduser() if chosen else default_cache_dir() / "verdicts"


def path_of(facts: Mapping[str, Any]) -> Path:
    """The file of the verdict for these facts."""
    return folder() / f"{facts['type']}-{device_identity.digest(dict(facts))}.json"


def save(verdict: Mapping[str, Any]) -> Path:
    """Write a verdict into its folder, atomically, and forget what was read before.

    Raises:
        OSError: the folder cannot be written to; the message names it.
    """
    path = path_of(verdict["device"])
    write_sealed(path, verdict)
    forget()
    return path


@contextlib.contextmanager
def locked(facts: Mapping[str, Any]) -> Iterator[None]:
    """One process at a time verifies devices with these facts, whatever their index; the others wait and say so."""
    from filelock import FileLock, Timeout  # a dependency of torch

    folder().mkdir(parents=True, exist_ok=True)
    lock = FileLock(path_of(facts).with_suffix(".lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        notice("another process verifies the kernels of this device; waiting for its verdict")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def load(device: torch.device) -> dict[str, Any] | None:
    """The verdict for this device with these libraries and kernels; None where there is none.

    A damaged file counts as none, with a warning.
    """
    places = [place for place in (folder(), SHIPPED) if place.is_dir()]
    if not places or (device.type == "cuda" and not torch.cuda.is_available()):
        return None  # nothing to compare with: do not ask the device
    facts = device_identity.identity(device)
    for place in places:
        path = place / path_of(facts).name
        if not path.is_file():
            continue
        try:
            verdict = read_sealed(path)
            choices_of(verdict)
            if verdict["device"] == facts:
                return dict(verdict)
            raise ValueError("it is for another device")
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            warnings.warn(
                f"the verdict on kernels in {path} cannot be used ({error}); `actscale-fast verify` makes a new one",
                RuntimeWarning,
                stacklevel=2,
            )
    return None


def choices_of(verdict: Mapping[str, Any]) -> Choices:
    """The table that `auto` looks up.

    Raises:
        ValueError, KeyError, TypeError: not a verdict.
    """
    if verdict["format"] != FORMAT:
        raise ValueError(f"format: got {verdict['format']!r}, expected {FORMAT}")
    table: Choices = {}
    for op, by_dtype in verdict["choices"].items():
        for dtype, choice in by_dtype.items():
            small, medium, large = (choice["fastest"][size] for size in SIZES)
            passed = tuple(choice["passed"])
            level = choice.get("level")
            known = op in OPS and {small, medium, large} <= {"reference", *passed}
            if not known or not isinstance(level, str | None):
                raise ValueError(f"choices: got {op!r} with {choice!r}")
            table[op, getattr(torch, dtype)] = Choice((small, medium, large), passed, level)
    return table


@functools.cache
def choices(device_type: str, index: int | None) -> Choices | None:
    """The table for a device, read once per process; None without a verdict."""
    verdict = load(torch.device(device_type, index) if index is not None else torch.device(device_type))
    return None if verdict is None else choices_of(verdict)


def forget() -> None:
    """Read verdicts anew when they are next asked for."""
    choices.cache_clear()


#: (device type, index, op, dtype) of kernels that failed their canary in this process: the reference takes over.
distrusted: set[tuple[str, int | None, str, torch.dtype]] = set()
