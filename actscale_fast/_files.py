"""Files that appear whole or not at all, whose errors name the file, and whose writers clean up after killed ones."""

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

#: A temporary is ".<name>.tmp-<host>-<process>-<random><suffix>": its writer can be told from its name.
_TEMPORARY = re.compile(r"\..+\.tmp-(?P<host>[0-9a-f]{8})-(?P<process>\d{1,10})-[0-9a-f]{8}(\.\w*)?", re.DOTALL)
_A_DAY = 24 * 3600.0


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not.

    The contents reach the disk before the name does: a power cut leaves the old file or the new one. Temporaries that
    killed processes left in the folder are removed.

    Raises:
        OSError: the file cannot be written; names `path`.
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
    """Write a file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def naming(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The same error, with the file that it is about."""
    if error.errno is None:
        return OSError(f"{os.fspath(path)}: {error}")
    return OSError(error.errno, error.strerror or os.strerror(error.errno), os.fspath(path))


def check_writable(path: str | os.PathLike[str], n_bytes: int = 0) -> None:
    """Find out now whether a file can be written here later; nothing is left behind but its folder.

    Args:
        path: of the file, whether it is there already or not.
        n_bytes: how large it will be, at least.

    Raises:
        OSError: the folder cannot be made or written in, the path is no regular file, or the disk has no room; names
            the path.
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
    """The size of a file that can be opened without waiting.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a folder, a pipe or another thing that is no file.
        OSError: it cannot be reached; names it.
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
    """Remove the temporaries of this host's dead processes, and of any process where they are older than a day."""
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
    """Let one writer at a time into a folder, where the system can lock folders; waits ten seconds at most."""
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
    """Of this host and, in a container, its numbering of processes."""
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
    """Let a rename reach the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
