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

from .._files import atomic_path, check_writable, naming
from .._json import parsed
from .._tensor_files import Header, check_seal, read_header, save_file
from .distributed import ALONE, World
from .weights_digest import weights_digest

__all__ = ["FitState", "check_place", "digest", "load", "restore", "save", "weights_digest"]

_FORMAT, _OLDER = "actscale_fast fit 2", ("actscale_fast fit 1",)
_SPARE = 256 << 20  # bytes of a file beside its tensors; a step's record has about 250


@dataclass(slots=True)
class FitState:
    """Everything a step changes."""

    step: int
    tensors: dict[str, Tensor]  # parameters, their Adam moments and step counters
    history: list[dict[str, float]]


def check_place(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor] | None = None,
    *,
    world: World = ALONE,
    new: bool = False,
) -> None:
    """Check before the first step that the state, or another file, can be written.

    Args:
        path: the file.
        tensors: the tensors of the state, which need room on the disk.
        world: processes that all call this; an error of the leading one is raised in all of them.
        new: skip a file that already exists, which may belong to a finished fit.

    Raises:
        OSError: the file cannot be written; the message names the path.
    """
    error = None
    if world.leads and not (new and Path(path).exists()):
        try:
            check_writable(path, _n_bytes(tensors or {}))
        except OSError as found:
            error = found
    error = world.gather(error)[0]
    if error is not None:
        raise error


def save(path: str | os.PathLike[str], state: FitState, settings: dict[str, Any]) -> None:
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


def load(path: str | os.PathLike[str], settings: dict[str, Any], expected: dict[str, Tensor]) -> FitState | None:
    """The state in `path`, or None where there is no such file.

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
        # A larger file belongs to another intervention, and is refused below by its settings or shapes.
        if header.size <= 2 * _n_bytes(expected) + _SPARE:
            check_seal(path, header)
        saved = parsed(header.metadata["settings"].encode(), finite=False)
        progress = parsed(header.metadata["progress"].encode(), finite=False)
        step, history = _checked_progress(progress)
        if not isinstance(saved, dict):
            raise ValueError("its settings are no object")
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
    return FitState(step, tensors, history)


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
            raise ValueError("its history is no list of numbers by name")
    return step, history


def _n_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def restore(state: FitState, targets: dict[str, Tensor]) -> None:
    """Copy the state's tensors into `targets`, in place."""
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(state.tensors[name])


def digest(content: Any) -> str:
    """16 hexadecimal digits that stand for JSON content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
