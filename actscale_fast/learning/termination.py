"""Saving on SIGTERM, the signal with which schedulers end a job, as on Ctrl-C."""

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
    """Unwinds the stack up to `saving_on_sigterm`, through the `finally` clauses that save."""


@contextlib.contextmanager
def saving_on_sigterm(wanted: bool = True) -> Iterator[None]:
    """Turn SIGTERM into an exception inside the block, then deliver it as usual.

    The block's `finally` clauses run first. Then the previous handler is restored and receives the signal; if it
    returns, the process exits with status 143. Further signals that arrive in the meantime are not lost but change
    nothing. If SIGTERM is ignored, or outside the main thread, the block runs unchanged.

    Args:
        wanted: False leaves signals alone, because there is nothing to save.
    """
    former: Any = None
    if wanted and threading.current_thread() is threading.main_thread():
        former = signal.getsignal(signal.SIGTERM)
    if former in (None, signal.SIG_IGN):  # None: a handler installed outside Python, which cannot be restored
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
        if received:  # the signal ends the process, so a failed save must be reported now
            traceback.print_exc()
        raise
    finally:
        signal.signal(signal.SIGTERM, former)
        if received:
            os.kill(os.getpid(), signal.SIGTERM)
    if received:
        sys.exit(128 + signal.SIGTERM)
