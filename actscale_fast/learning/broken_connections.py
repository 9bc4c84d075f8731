"""Telling the other processes of a call why one stopped, and saying so where its connection breaks.

A process that raises an error inside a pass leaves the others inside a collective operation, which cannot be called
off: it fails when the process ends and its connections close, or at the time-out of the process group. So each process
that stops leaves its reason in the group's store, and the error of the others names it.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..architectures.hugging_face import unwrap
from ..architectures.sharding import model_processes

#: Numbers the calls of this process, so that none reads the reasons of an earlier one.
_calls = itertools.count()
_EXPLAINED = "distributed: "
#: Seconds that a reason may need to arrive.
_PATIENCE = 1.0


@contextlib.contextmanager
def explained(ranks: Sequence[int]) -> Iterator[None]:
    """The block of a call that several processes make together.

    Args:
        ranks: all of them, in the default process group.

    Raises:
        RuntimeError: a connection broke; the message names the process that stopped, and why if it could say so.
    """
    if len(ranks) == 1:
        yield
        return
    prefix, rank = f"actscale_fast/stopped/{next(_calls)}", torch.distributed.get_rank()
    try:
        yield
    except BaseException as error:
        if not is_broken_connection(error):  # or one that was explained already
            _write(f"{prefix}/{rank}", f"{type(error).__name__}: {error}")
            raise
        reasons = _read({other: f"{prefix}/{other}" for other in ranks if other != rank})
        said = [f"process {other} stopped with {reason}" for other, reason in reasons.items()]
        raise RuntimeError(
            f"{_EXPLAINED}{'; '.join(said) or _without_reason(error)}. This process cannot go on without it: start "
            "all of them again. A fit with checkpoint= and a sweep with folder= continue from what they have saved"
        ) from error


@contextlib.contextmanager
def explained_where_sharded(model: nn.Module) -> Iterator[None]:
    """`explained` for the processes that hold a model together."""
    with explained(model_processes(unwrap(model)).ranks):
        yield


def _without_reason(error: BaseException) -> str:
    """What is known where no process has left a reason."""
    if "timed out" in str(error).lower():
        return f"another process did not answer within the time-out of the process group ({_first_line(error)})"
    return f"another process ended without a reason; it may have been killed ({_first_line(error)})"


def is_broken_connection(error: BaseException) -> bool:
    """Whether a collective operation failed because another process is not there."""
    if isinstance(error, getattr(torch.distributed, "DistError", ())):
        return True
    text = str(error)
    if not isinstance(error, RuntimeError) or text.startswith(_EXPLAINED):
        return False
    return "/gloo/" in text or "NCCL" in text or "Connection closed by" in text


def _first_line(error: BaseException) -> str:
    """What gloo says, without the place in its sources and its advice."""
    line = str(error).partition("\n")[0].partition(". This is typically")[0]
    return line.partition("] ")[2] if line.startswith("[") else line


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


def _write(key: str, reason: str) -> None:
    with contextlib.suppress(Exception):  # the process with the store may be the one that is gone
        _store().set(key, reason)


def _read(keys: dict[int, str]) -> dict[int, str]:
    """The reasons that processes have left, by their rank; waits a little for the first one."""
    found: dict[int, str] = {}
    with contextlib.suppress(Exception):
        store, begun = _store(), time.monotonic()
        while not found and time.monotonic() < begun + _PATIENCE:
            found = {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
            time.sleep(0.0 if found else 0.05)
    return found
