"""The folder of a saved intervention: a tensors file named after its contents, and a description that commits it.

`intervention.json` (see `description`) is renamed into place last, so that a process killed at any moment leaves either
the old intervention or the new one intact. Files that the description no longer refers to are removed afterwards. A
Composite keeps each part in a subfolder named after its contents.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor

from .._files import exclusive, naming, regular_size, write_bytes
from .._json import read_limited, shown
from .._tensor_files import read_header
from ..architectures.location import Location
from .description import DESCRIPTION, TENSORS_1, Description, description_bytes, inside, read_description

_TENSORS = re.compile(r"intervention-([0-9a-f]{16})\.safetensors")
_PART = re.compile(r"part-([0-9a-f]{16})(-[1-9]\d{0,3})?")
_HEADER = 1 << 20  # bytes of a tensors file beside its values, at most


class Savable(Protocol):
    """The methods of an intervention that saving calls."""

    def check_finite(self) -> None: ...
    def write_data(self, folder: Path) -> tuple[dict[str, Any], list[str]]: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """An intervention at a single location, ready to be written."""

    name: str  # of the tensors file
    payload: bytes
    description: dict[str, Any]


def save(intervention: Savable, folder: Path, strength: float | None = None) -> str:
    """Write an intervention, replacing any that the folder holds; returns the SHA-256 of its description.

    Args:
        intervention: must be finite, which is checked before anything is written.
        folder: created if it does not exist.
        strength: that of the `ActScaleModel` being saved.
    """
    intervention.check_finite()
    folder = made_folder(folder)
    with exclusive(folder):
        former = _parts_of_format_1(folder)
        fields, kept = intervention.write_data(folder)
        raw = description_bytes(fields if strength is None else fields | {"strength": strength})
        write_bytes(folder / DESCRIPTION, raw)
        _remove_replaced(folder, kept, former)
    return hashlib.sha256(raw).hexdigest()


def encode(cls: type, location: Location, n_groups: int | None, tensors: dict[str, Tensor]) -> Encoded:
    """Encode an intervention of a class at a single location."""
    payload = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(payload).hexdigest()
    name = f"intervention-{digest[:16]}.safetensors"
    description: dict[str, Any] = {
        "class": cls.__name__,
        "module": cls.__module__,
        "n_groups": n_groups,
        "location": location.to_dict(),
        "tensors": {"file": name, "sha256": digest},
    }
    if location.origin is not None:
        description["model"] = location.origin.to_dict()
    return Encoded(name, payload, description)


def made_folder(folder: Path) -> Path:
    """Create the folder if it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"folder: {folder} is a file, expected a folder") from None
    except OSError as error:
        raise naming(error, folder) from error
    return folder


def load(description: Description, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read the tensors, which must have these names and shapes; see `base.load_intervention` for the errors."""
    name, digest = description.tensors_file()
    path = inside(description.folder, name)
    try:
        size = regular_size(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found, expected a folder written by save_pretrained") from None
    largest = min(_HEADER + 8 * sum(math.prod(shape) for shape in shapes.values()), _memory())
    if size > largest:  # before a byte of it is read
        raise ValueError(
            f"{path}: has {size} bytes, expected at most {largest} for the tensors described in {DESCRIPTION}"
        )
    payload = read_limited(path, largest)
    if hashlib.sha256(payload).hexdigest() != digest:
        raise ValueError(f"{path}: damaged or truncated, its checksum is not the one in {DESCRIPTION}")
    try:
        header = read_header(path, _HEADER)
        if header.shapes != shapes:
            raise ValueError(f"holds tensors {shown(header.shapes)}, expected {shown(shapes)}")
        for key, dtype in header.dtypes.items():
            if not dtype.is_floating_point:
                raise ValueError(f"{key!r} is {dtype}, expected floating point")
        return load_tensors(payload)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged, or not an intervention's tensors ({error})") from None


def _memory() -> int:
    """The physical memory in bytes; a sparse file may claim more."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return 1 << 36


def remove_files(folder: Path) -> None:
    """Remove the files of an intervention whose description is gone already; other files stay."""
    with exclusive(folder):
        _remove_replaced(folder, (), set())


def _parts_of_format_1(folder: Path) -> set[str]:
    """The part folders of a Composite that an earlier version saved here."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        listed = [part["folder"] for part in read_description(folder).fields["parts"]]
        return {name for index, name in enumerate(listed) if name == f"part-{index}"}
    return set()


def _remove_replaced(folder: Path, kept: Iterable[str], former: set[str]) -> None:
    """Remove files of earlier saves that the description no longer refers to; other files stay."""
    kept = set(kept)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        if name in kept:
            continue
        path = folder / name
        if _TENSORS.fullmatch(name) or name == TENSORS_1:
            with contextlib.suppress(OSError):
                path.unlink()
        elif (_PART.fullmatch(name) or name in former) and not path.is_symlink():
            _remove_part(path)


def _remove_part(folder: Path) -> None:
    """Remove a part's own files, the description last, and its folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name == DESCRIPTION):
            own = _TENSORS.fullmatch(path.name) or path.name in (TENSORS_1, DESCRIPTION)
            if own or path.name.startswith(".intervention"):  # a temporary of a killed save
                path.unlink()
        folder.rmdir()
