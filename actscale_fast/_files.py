"""Atomic file writes, errors that name the file, and removal of the temporaries of killed processes."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

#: Temporaries are called ".<name>.tmp-<host>-<process>-<random><suffix>", which identifies their writer.
_TEMPORARY = re.compile(r"\..+\.tmp-(?P<host>[0-9a-f]{8})-(?P<process>\d{1,10})-[0-9a-f]{8}(\.\w*)?", re.DOTALL)
_A_DAY = 24 * 3600.0


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not.

    The contents reach the disk before the name does: a power cut leaves the old file or the new one. Temporaries that
    killed processes left in the folder are removed.

    Raises:
        OSError: the file cannot be written; the message names `path`.
    """
    path = Path(path)
    _make_parent(path)
    remove_stale_temporaries(path.parent)
    temporary = path.with_name(_temporary_name(path))
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.filename is None or str(temporary) in (str(error.filename), str(error.filename2)):
            raise naming(error, path) from error
        raise


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def naming(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The same error with the name of the file in it."""
    if error.errno is None:
        return OSError(f"{os.fspath(path)}: {error}")
    return OSError(error.errno, error.strerror or os.strerror(error.errno), os.fspath(path))


def check_writable(path: str | os.PathLike[str], n_bytes: int = 0) -> None:
    """Check that a file can be written at `path` later; leaves nothing behind but its folder.

    Args:
        path: the file, which may exist already.
        n_bytes: its expected minimum size.

    Raises:
        OSError: the folder cannot be created or written to, the path is not a regular file, or the disk is full; the
            message names the path.
    """
    path = Path(path)
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            kind = IsADirectoryError if path.is_dir() else OSError
            raise kind(errno.EISDIR if path.is_dir() else errno.EINVAL, "not a regular file", str(path))
        _make_parent(path)
        probe = path.with_name(_temporary_name(path))
        try:
            with probe.open("xb") as file:
                file.write(b"\0")
            if n_bytes > shutil.disk_usage(path.parent).free:
                raise OSError(errno.ENOSPC, f"no room on the disk for {n_bytes} bytes", str(path))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise naming(error, path) from error


def regular_size(path: Path) -> int:
    """The size of a regular file; opening a pipe, for example, would block.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the path is not a regular file.
        OSError: the path cannot be reached. All messages name the path.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found") from None
    except OSError as error:  # a loop of links, a folder that may not be searched, a part of the path that is a file
        raise naming(error, path) from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: not a regular file")
    return found.st_size


def remove_stale_temporaries(folder: Path) -> None:
    """Remove temporaries left by dead processes on this host, and any that are more than a day old."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _TEMPORARY.fullmatch(entry.name) if entry.name.startswith(".") else None
            if found is None:
                continue
            with contextlib.suppress(OSError):
                dead = found["host"] == _host() and not _alive(int(found["process"]))
                if dead or time.time() - entry.stat(follow_symlinks=False).st_mtime > _A_DAY:
                    os.unlink(entry.path)  # noqa: PTH108 (an entry, not a Path)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Admit one writer to a folder at a time if the system can lock folders; waits at most ten seconds."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        for _ in range(100):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(handle)


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"its folder cannot be made: {error.strerror}"
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise NotADirectoryError(errno.ENOTDIR, "a part of its path is a file, not a folder", str(path)) from error
        raise OSError(error.errno, why, str(path)) from error


def _temporary_name(path: Path) -> str:
    name = path.name if len(os.fsencode(path.name)) < 180 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    ending = path.suffix if re.fullmatch(r"\.\w{1,16}", path.suffix) else ""
    return f".{name}.tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}{ending}"


@functools.cache
def _host() -> str:
    """A short name for this host and, in containers, its process namespace."""
    numbering = ""
    with contextlib.suppress(OSError, AttributeError):
        numbering = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{socket.gethostname()} {numbering}".encode()).hexdigest()[:8]


def _alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is one that does something
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or a number that no process has
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Flush a rename to disk, if the system supports that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
