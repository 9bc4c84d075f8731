"""Locks on files that end with the process that holds them, however it ends."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ._files import naming
from ._log import notice

#: How often a process that waits for a lock tries again, in seconds, and after how many tries it says so.
POLL, _PATIENCE = 0.2, 25


class HeldLock:
    """A lock that this process holds; `release` removes its file and lets go."""

    def __init__(self, path: Path, handle: int | None) -> None:
        self.path, self._handle = path, handle

    def release(self) -> None:
        """Let go; called twice, it does nothing the second time."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        # First the name, then the lock: whoever opened the file meanwhile sees that the name is no longer its own.
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(handle)


def try_lock(path: Path) -> HeldLock | None:
    """Lock a file, which is created, or return None if another process (or another lock of this one) holds it.

    The kernel holds the lock for an open file, so that it ends with the process, even after SIGKILL. On NFS the server
    holds it for the client (Linux passes `flock` on as a lock of the whole file, for which the file has to be open for
    writing). Where a file system has no locks, the caller gets one that excludes nobody, and one line says so.

    Raises:
        OSError: the file cannot be created; the message names it.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return HeldLock(path, None)
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise naming(error, path) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # some file systems report a held lock as EACCES
            os.close(handle)
            return None
        except OSError as error:
            os.close(handle)
            path.unlink(missing_ok=True)
            _say_once(
                f"{path.parent}: this file system has no locks ({error.strerror}); jobs may do the same work twice"
            )
            return HeldLock(path, None)
        if _is_named(path, handle):
            with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
                os.ftruncate(handle, 0)
                os.write(handle, f"{socket.gethostname()}, process {os.getpid()}".encode())
            return HeldLock(path, handle)
        os.close(handle)  # the former holder has removed this file


def holder(path: Path) -> str:
    """Who holds a lock, as text."""
    with contextlib.suppress(OSError):
        return path.read_bytes()[:200].decode(errors="replace") or "another process"
    return "another process"


@contextlib.contextmanager
def locked(
    path: Path, what: str, say: Callable[[str], None] = notice,
    attempted: Callable[[Callable[[], bool]], bool] = lambda claim: claim(),
) -> Iterator[None]:  # fmt: skip
    """Hold a lock inside the block, after waiting for as long as another process holds it.

    Args:
        path: the lock's file; its folder must exist.
        what: what the lock is for, for the line that says that this process is waiting.
        say: prints that line.
        attempted: makes one attempt and returns whether it succeeded. Several processes for which one of them takes the
            lock ask it each time, because no collective operation may wait for long.
    """
    tries, held = 0, contextlib.ExitStack()

    def claim() -> bool:
        lock = try_lock(path)
        if lock is not None:
            held.callback(lock.release)
        return lock is not None

    with held:
        while not attempted(claim):
            tries += 1
            if tries == _PATIENCE:
                say(f"waiting for {what}, which {holder(path)} is working on")
            time.sleep(POLL)
        yield


def _is_named(path: Path, handle: int) -> bool:
    """Whether the open file is still the one by that name."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(handle)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        notice(text)
