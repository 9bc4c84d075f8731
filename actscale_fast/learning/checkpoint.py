"""The state of a fit on disk: one safetensors file with a checksum of all its bytes, written atomically.

A resumed fit gives the same bits as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import defaults
from .._checks import check_counts
from .._files import atomic_path, check_writable, naming
from .._json import parsed
from .._tensor_files import Header, check_checksum, read_header, save_file
from .distributed import SINGLE_PROCESS, ProcessGroup

_FORMAT, _OLDER = "actscale_fast fit 2", ("actscale_fast fit 1",)
_SPARE = 256 << 20  # bytes of a file beside its tensors; a step's record has about 250


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a fit keeps its state, and how often.

    Args:
        path: a file that the state is written to, atomically. If it exists, the fit resumes from it, to the same bits
            as an uninterrupted one. None: the state is not kept.
        every: number of steps between two writes. The state is also written at the end, on Ctrl-C and on SIGTERM.

    Raises:
        ValueError: `every` is not a positive integer.
    """

    path: str | os.PathLike[str] | None = None
    every: int = defaults.CHECKPOINT_EVERY

    def __post_init__(self) -> None:
        check_counts(every=self.every)

    @classmethod
    def of(cls, given: str | os.PathLike[str] | Checkpoint | None, every: int | None = None) -> Checkpoint:
        """The checkpoint that the arguments of `fit` describe."""
        made = given if isinstance(given, Checkpoint) else cls(given)
        if every is None:
            return made
        check_counts(checkpoint_every=every)
        return cls(made.path, every)


@dataclass(slots=True)
class SavedFit:
    """Everything a step changes."""

    step: int
    tensors: dict[str, Tensor]  # parameters, their Adam moments and step counters
    history: list[dict[str, float]]


def check_writable_checkpoint(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor] | None = None,
    *,
    processes: ProcessGroup = SINGLE_PROCESS,
    new: bool = False,
) -> None:
    """Check before the first step that the state, or another file, can be written.

    Args:
        path: the file.
        tensors: the tensors of the state, which need room on the disk.
        processes: the processes that all call this; an error on rank 0 is raised in all of them.
        new: skip a file that already exists, which may belong to a finished fit.

    Raises:
        OSError: the file cannot be written; the message names the path.
    """
    error = None
    if processes.is_rank_zero and not (new and Path(path).exists()):
        try:
            check_writable(path, _n_bytes(tensors or {}))
        except OSError as found:
            error = found
    error = processes.all_gather(error)[0]
    if error is not None:
        raise error


def save(path: str | os.PathLike[str], state: SavedFit, settings: dict[str, Any]) -> None:
    """Write the state and the settings it belongs to.

    Raises:
        OSError: the file cannot be written; the message names it, and the previous file is still there.
    """
    metadata = {
        "format": _FORMAT,
        "settings": json.dumps(settings, sort_keys=True),
        "progress": json.dumps({"step": state.step, "history": state.history}),
    }
    with atomic_path(path) as temporary:
        save_file(state.tensors, temporary, metadata=metadata)


def load(path: str | os.PathLike[str], settings: dict[str, Any], expected: dict[str, Tensor]) -> SavedFit | None:
    """The state in `path`, or None if there is no such file.

    Raises:
        ValueError: the file was changed or truncated, is not the checkpoint of a fit, was made with other settings
            (which are named), or holds tensors that do not fit the intervention.
        OSError: the file cannot be read; the message names it.
    """
    path = Path(path)
    if not path.exists():
        return None
    if path.is_dir():
        raise ValueError(f"checkpoint: {path} is a folder, expected the path of a file")
    try:
        header = read_header(path)
        _check_format(header)
        # A larger file belongs to another intervention, and its settings or shapes are refused below.
        if header.size <= 2 * _n_bytes(expected) + _SPARE:
            check_checksum(path, header)
        saved = parsed(header.metadata["settings"].encode(), finite=False)
        progress = parsed(header.metadata["progress"].encode(), finite=False)
        step, history = _checked_progress(progress)
        if not isinstance(saved, dict):
            raise ValueError("its settings are not an object")
    except _OtherKindError as error:
        raise ValueError(f"checkpoint: {path} {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint: {path} is damaged, truncated or another kind of file ({error})") from None
    current = json.loads(json.dumps(settings))
    other = [
        f"{name} {saved.get(name)!r}, now {current.get(name)!r}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if other:
        raise ValueError(f"checkpoint: {path} belongs to another fit: {'; '.join(other)}; name another file")
    found = {name: (header.dtypes[name], shape) for name, shape in header.shapes.items()}
    wanted = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in expected.items()}
    if found != wanted:
        raise ValueError(f"checkpoint: {path} holds {found}, expected {wanted}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in wanted}
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path} is damaged, truncated or another kind of file ({error})") from None
    except OSError as error:
        raise naming(error, path) from error
    return SavedFit(step, tensors, history)


class _OtherKindError(ValueError):
    """An intact file that is not a checkpoint of this version."""


def _check_format(header: Header) -> None:
    found = header.metadata.get("format")
    if found in _OLDER:
        raise _OtherKindError("was written by an earlier version, without a checksum; delete it to start again")
    if found != _FORMAT:
        raise _OtherKindError(f"is not a checkpoint of a fit (format {found!r})")


def _checked_progress(progress: Any) -> tuple[int, list[dict[str, float]]]:
    step, history = progress["step"], progress["history"]
    if type(step) is not int or not isinstance(history, list) or step != len(history):
        raise ValueError("its steps do not agree with its history")
    for record in history:
        if not isinstance(record, dict) or any(type(value) not in (int, float) for value in record.values()):
            raise ValueError("its history is not a list of numbers by name")
    return step, history


def _n_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def restore(state: SavedFit, targets: dict[str, Tensor]) -> None:
    """Copy the state's tensors into `targets`, in place."""
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(state.tensors[name])


def digest(content: Any) -> str:
    """16 hexadecimal digits that stand for JSON content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
