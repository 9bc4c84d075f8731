"""One command in several processes, as torchrun starts them: they share the model and the work, and the first writes.

Every process runs the whole command, because each pass of a sharded model is the work of all. All but the first print
only warnings and errors, and write their results into a folder that is deleted at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..architectures.sharding import ModelProcesses

#: The commands that several processes can run together; what they call is compared with one process in the tests.
COMMANDS = ("attribution", "evaluate", "extract", "fit", "generate", "heads", "sweep")
#: The commands that several processes would run side by side, doing the same work and writing the same files.
OTHERS = ("bench", "combine", "demo", "interchange", "merge", "plot", "reproduce", "stress")
#: Options that name what a command writes.
_WRITTEN = ("out", "plot")

_current: list[ModelProcesses] = []


def current() -> ModelProcesses:
    """The processes that run this command together; a single one unless torchrun started several."""
    from ..architectures import sharding

    return _current[-1] if _current else sharding.ALONE


def place() -> str:
    """ " in process 1 of 2" where several processes run this command, for an error; never an error itself."""
    with contextlib.suppress(ValueError):
        rank, size = _started()
        return f" in process {rank} of {size}" if size > 1 else ""
    return ""


@contextlib.contextmanager
def together(options: argparse.Namespace) -> Iterator[bool]:
    """Join the processes that run this command, while the block runs; with a single one, only check the options.

    Yields:
        Whether this process writes the files of the command.

    Raises:
        ValueError: a command that runs in one process, `--tp` and `--fsdp` that do not make up all processes, or an
            environment that does not say how the processes find each other.
    """
    if options.command not in COMMANDS + OTHERS:  # those that only print, or look after themselves
        yield True
        return
    rank, size = _started()
    _check(options, size)
    if size == 1:
        yield True
        return
    from ..architectures.sharding import ModelProcesses
    from ..learning.broken_connections import explained

    with contextlib.ExitStack() as stack:
        if rank:
            stack.enter_context(_unseen(options, rank))
        made = not _initialized()
        if made:
            _join(size, says=not rank and not getattr(options, "quiet", False))
        _current.append(ModelProcesses(tuple(range(size)), rank))
        stack.callback(_current.pop)
        with explained(range(size)):
            yield not rank
        if made:  # after an error the connections close with the process: here NCCL might wait for the others
            sys.modules["torch"].distributed.destroy_process_group()


def _started() -> tuple[int, int]:
    """(the number of this process, how many there are): of the process group, or by the environment.

    Raises:
        ValueError: RANK or WORLD_SIZE is not a number.
    """
    if _initialized():
        group = sys.modules["torch"].distributed
        return group.get_rank(), group.get_world_size()
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or size is None:
        return 0, 1
    try:
        found = int(rank), int(size)
    except ValueError:
        raise ValueError(f"{_environment()}, expected numbers; unset both to run in one process") from None
    return found if found[1] > 1 else (0, 1)


def _initialized() -> bool:
    """Whether this process belongs to a process group; without importing torch, as no group exists then."""
    group: Any = getattr(sys.modules.get("torch"), "distributed", None)
    return group is not None and group.is_available() and bool(group.is_initialized())


def _environment() -> str:
    return f"the environment has RANK={os.environ.get('RANK')} and WORLD_SIZE={os.environ.get('WORLD_SIZE')}"


def _join(size: int, *, says: bool) -> None:
    """Create the process group; with `says`, a line names what this process waits for, unless torchrun started all."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"{_environment()}, but not {' and '.join(missing)}, by which the processes find each other; start them "
            "with torchrun, or unset RANK and WORLD_SIZE to run in one process"
        )
    if says and "TORCHELASTIC_RUN_ID" not in os.environ:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(f"actscale-fast: {_environment()}: waiting for all {size} processes at {where}", file=sys.stderr)
    from ..learning.distributed import join_environment

    join_environment()


def _check(options: argparse.Namespace, size: int) -> None:
    if size > 1 and options.command in OTHERS:
        raise ValueError(
            f"{options.command} runs in one process, but {_environment()}; start it without torchrun, or unset both"
        )
    parts = {name: getattr(options, name, 1) for name in ("tp", "fsdp")}
    wanted = parts["tp"] * parts["fsdp"]
    if wanted in (1, size):
        return
    given = " ".join(f"--{name} {number}" for name, number in parts.items() if number > 1)
    if size == 1:
        raise ValueError(
            f"{given} needs {wanted} processes, and this is one; start them with torchrun --nproc-per-node {wanted} "
            f"--no-python actscale-fast {options.command} {given} …"
        )
    raise ValueError(f"{given} needs {wanted} processes, but {size} were started")


@contextlib.contextmanager
def _unseen(options: argparse.Namespace, rank: int) -> Iterator[None]:
    """Print nothing but warnings and errors, and write into a folder that is deleted.

    The folder of a sweep is left as it is: its processes agree on who writes what there.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="actscale-fast-")))
        if options.command == "sweep":
            options.plot = str(folder / "front.png")
        else:
            for name in _WRITTEN:
                given = getattr(options, name, None)
                if given is not None:
                    setattr(options, name, str(folder / f"{name}{Path(given).suffix}"))
        options.quiet, options.speaker = True, f"process {rank}: "
        nowhere: Any = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield
