"""SIGTERM, with which schedulers end a job, saves as Ctrl-C does."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any


class _Terminated(BaseException):
    """Unwinds the work at hand up to `saving_on_sigterm`, through the `finally` clauses that save."""


@contextlib.contextmanager
def saving_on_sigterm(wanted: bool = True) -> Iterator[None]:
    """Let SIGTERM end the block as an exception does, and after that the process as it would have without.

    What the block has under `finally` runs first. The former handler is in force again then, and gets the signal; where
    it returns, the process exits with status 143. Signals that arrive meanwhile wait. Where SIGTERM is ignored, or
    outside the main thread, the block runs as it is.

    Args:
        wanted: False leaves signals alone: there is nothing to save.
    """
    former: Any = None
    if wanted and threading.current_thread() is threading.main_thread():
        former = signal.getsignal(signal.SIGTERM)
    if former in (None, signal.SIG_IGN):  # None: a handler that was not set from Python cannot be put back
        yield
        return
    received = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if not received:
            received = True
            raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except _Terminated:
        pass
    except BaseException:
        if received:  # what could not be saved is said before the signal ends the process
            traceback.print_exc()
        raise
    finally:
        signal.signal(signal.SIGTERM, former)
        if received:
            os.kill(os.getpid(), signal.SIGTERM)
    if received:
        sys.exit(128 + signal.SIGTERM)
