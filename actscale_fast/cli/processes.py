"""One command in several processes, as torchrun starts them: they share the model and the work, and the first writes.

Every process runs the whole command, because each pass of a sharded model is the work of all. All but the first print
nothing but errors, and write their results into a folder that is deleted at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..architectures.sharding import ModelProcesses

#: The commands that several processes can run together; what they call is compared with one process in the tests.
COMMANDS = ("attribution", "evaluate", "extract", "fit", "generate", "heads", "sweep")
#: Options that name what a command writes.
_WRITTEN = ("out", "plot")

_current: list[ModelProcesses] = []


def current() -> ModelProcesses:
    """The processes that run this command together; a single one unless torchrun started several."""
    from ..architectures.sharding import ALONE

    return _current[-1] if _current else ALONE


def started() -> tuple[int, int]:
    """(the number of this process, how many there are), as torchrun or accelerate say in the environment."""
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    return (int(os.environ["RANK"]), size) if size > 1 else (0, 1)


@contextlib.contextmanager
def together(options: argparse.Namespace) -> Iterator[bool]:
    """Join the processes that run this command, while the block runs; with a single one, only check the options.

    Yields:
        Whether this process writes the files of the command.

    Raises:
        ValueError: a command that runs in one process, or `--tp` and `--fsdp` that do not make up all processes.
    """
    rank, size = started()
    _check(options, size)
    if size == 1:
        yield True
        return
    from ..architectures.sharding import ModelProcesses
    from ..learning.distributed import environment_group

    with contextlib.ExitStack() as stack:
        stack.enter_context(environment_group())
        if rank:
            stack.enter_context(_unseen(options))
        _current.append(ModelProcesses(tuple(range(size)), rank))
        stack.callback(_current.pop)
        yield not rank


def _check(options: argparse.Namespace, size: int) -> None:
    if size > 1 and options.command not in COMMANDS:
        raise ValueError(f"{options.command} runs in one process, but torchrun or accelerate started {size}")
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
def _unseen(options: argparse.Namespace) -> Iterator[None]:
    """Print nothing but errors, and write into a folder that is deleted.

    The folder of a sweep is left as it is: its processes agree on who writes what there.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="actscale-fast-")))
        if options.command == "sweep":
            options.plot = str(folder / "front.png")
        else:
            for name in _WRITTEN:
                if getattr(options, name, None) is not None:
                    setattr(options, name, str(folder / Path(getattr(options, name)).name))
        options.quiet = options.muted = True
        nowhere: Any = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield
