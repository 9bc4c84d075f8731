"""The folder of a saved intervention: a tensors file named after its contents, and a description that commits it.

`intervention.json` holds the name and checksum of the tensors file and a checksum of its own bytes, and is renamed into
place last, so a process killed at any moment leaves either the old intervention or the new one intact. Files that the
description no longer refers to are removed afterwards. A Composite keeps each part in a subfolder named after its
contents.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor

from .._files import exclusive, naming, regular_size, write_bytes
from .._json import CHECKSUM, LARGE, check_seal, has_seal, parsed, read_limited, sealed
from .._tensor_files import read_header
from ..architectures.location import Location

if TYPE_CHECKING:
    from .base import Intervention

T = TypeVar("T")

FORMAT = 2
DESCRIPTION = "intervention.json"
#: The tensors file of format 1, whose description had no checksum of its own.
TENSORS_1 = "intervention.safetensors"
#: Classes of this package that are not imported with it.
_ELSEWHERE = {"JoLA": "actscale_fast.integrations.jola"}
_TENSORS = re.compile(r"intervention-([0-9a-f]{16})\.safetensors")
_PART = re.compile(r"part-([0-9a-f]{16})(-[1-9]\d{0,3})?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMON = {"format", "class"}
_KEYS = {
    (1, False): _COMMON | {"module", "n_groups", "location", "sha256"},
    (1, True): _COMMON | {"parts"},
    (2, False): _COMMON | {"module", "n_groups", "location", "tensors"},
    (2, True): _COMMON | {"parts"},
}
_HEADER = 1 << 20  # bytes of a tensors file beside its values, at most


@dataclass(frozen=True, slots=True)
class Description:
    """The contents of an `intervention.json`, already verified against its checksum."""

    folder: Path
    fields: dict[str, Any]
    sha256: str  # of the file

    @property
    def path(self) -> Path:
        return self.folder / DESCRIPTION

    def checked(self, make: Callable[[], T]) -> T:
        """The result of `make`; its errors become errors about this file."""
        try:
            return make()
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            why = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{self.path}: damaged or not an intervention ({why})") from None


@dataclass(frozen=True, slots=True)
class Encoded:
    """An intervention at a single location, ready to be written."""

    name: str  # of the tensors file
    payload: bytes
    description: dict[str, Any]


def save(intervention: Intervention, folder: Path, strength: float | None = None) -> str:
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


def encode(intervention: Intervention) -> Encoded:
    """Encode an intervention at a single location."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in intervention.saved_tensors().items()}
    payload = save_tensors(tensors)
    digest = hashlib.sha256(payload).hexdigest()
    name = f"intervention-{digest[:16]}.safetensors"
    description = {
        "class": type(intervention).__name__,
        "module": type(intervention).__module__,
        "n_groups": intervention.n_groups,
        "location": intervention.location.to_dict(),
        "tensors": {"file": name, "sha256": digest},
    }
    return Encoded(name, payload, description)


def description_bytes(fields: dict[str, Any]) -> bytes:
    """The bytes of `intervention.json`."""
    raw = sealed({"format": FORMAT, **fields})
    if len(raw) > LARGE:
        raise ValueError(f"intervention: its description has {len(raw)} bytes, expected at most {LARGE}")
    return raw


def made_folder(folder: Path) -> Path:
    """Create the folder if it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"folder: {folder} is a file, expected a folder") from None
    except OSError as error:
        raise naming(error, folder) from error
    return folder


def read_description(folder: Path, sha256: str | None = None) -> Description:
    """Read `intervention.json`; see `base.load_intervention` for the errors.

    Args:
        folder: the folder of the intervention.
        sha256: the expected checksum of the file, if another file records it.
    """
    path = inside(folder, DESCRIPTION)
    try:
        raw = read_limited(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: not found, expected a folder written by save_pretrained") from None
    digest = hashlib.sha256(raw).hexdigest()
    if sha256 not in (None, digest):
        raise ValueError(f"{path}: damaged, its checksum is not the one in {folder.parent / DESCRIPTION}")
    try:
        return Description(folder, _checked_fields(raw), digest)
    except ValueError as error:  # JSON and Unicode errors are ValueErrors
        raise ValueError(f"{path}: damaged or not an intervention ({error})") from None


def _checked_fields(raw: bytes) -> dict[str, Any]:
    if has_seal(raw):
        check_seal(raw)
    fields = parsed(raw)
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON {type(fields).__name__}, expected an object")
    version = fields.get("format")
    if type(version) is not int or version not in (1, FORMAT):
        raise ValueError(f"format {_shown(version)}, this version reads 1 and {FORMAT}")
    if has_seal(raw) != (version > 1):
        raise ValueError("no checksum" if version > 1 else "a checksum, which format 1 has not")
    fields.pop(CHECKSUM, None)
    name = fields.get("class")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError("no class" if name is None else f"class: got {_shown(name)}, expected a name")
    expected = _KEYS[version, name == "Composite"]
    unknown, missing = fields.keys() - expected - ({"strength"} if version > 1 else set()), expected - fields.keys()
    if unknown or missing:
        words = [f"missing: {', '.join(sorted(missing))}"] if missing else []
        words += [f"unknown: {_shown(sorted(unknown))}"] if unknown else []
        raise ValueError("; ".join(words))
    if not isinstance(fields.get("module", ""), str):
        raise ValueError(f"module: got {_shown(fields['module'])}, expected a string")
    if "strength" in fields:
        number("strength", fields["strength"])
    return fields


def number(name: str, value: Any) -> float:
    """A finite number from a file as a float; raises ValueError for anything else."""
    if type(value) not in (int, float) or not abs(value) < 1e300:
        raise ValueError(f"{name}: got {_shown(value)}, expected a finite number")
    return float(value)


def class_of(description: Description, classes: dict[str, type[Intervention]]) -> type[Intervention]:
    """The described class. Only modules in a fixed table are ever imported for it."""
    name = description.fields["class"]
    if name not in classes and name in _ELSEWHERE:
        importlib.import_module(_ELSEWHERE[name])
    if name not in classes:
        raise ValueError(
            f"{description.path}: unknown class {_shown(name)}, expected one of {', '.join(sorted(classes))}; "
            "import the module that defines your own class before loading"
        )
    return classes[name]


def place(description: Description) -> tuple[Location, int | None]:
    """The location and number of groups of an intervention at a single location."""

    def read() -> tuple[Location, int | None]:
        n_groups = description.fields["n_groups"]
        if n_groups is not None and (type(n_groups) is not int or not 1 <= n_groups < 1 << 31):
            raise ValueError(f"n_groups: got {_shown(n_groups)}, expected null or a positive integer")
        return Location.from_dict(description.fields["location"]), n_groups

    return description.checked(read)


def load(description: Description, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read the tensors, which must have these names and shapes; see `base.load_intervention` for the errors."""
    name, digest = description.checked(lambda: _tensors_file(description.fields))
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
            raise ValueError(f"holds tensors {_shown(header.shapes)}, expected {_shown(shapes)}")
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


def _tensors_file(fields: dict[str, Any]) -> tuple[str, str]:
    """(name, SHA-256) of the tensors file."""
    if fields["format"] == 1:
        return TENSORS_1, checked_sha256(fields["sha256"])
    told = fields["tensors"]
    if not isinstance(told, dict) or told.keys() != {"file", "sha256"}:
        raise ValueError(f"tensors: got {_shown(told)}, expected a file and its sha256")
    digest = checked_sha256(told["sha256"])
    if told["file"] != f"intervention-{digest[:16]}.safetensors":
        raise ValueError(f"tensors: got the file {_shown(told['file'])}, expected a name made of its checksum")
    return told["file"], digest


def checked_sha256(value: Any) -> str:
    """A SHA-256 from a file; raises ValueError for anything else."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"sha256: got {_shown(value)}, expected 64 hexadecimal digits")
    return value


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder. Files of a Hugging Face hub snapshot may be links to its blobs.

    Raises:
        ValueError: a link that leads out of the folder.
    """
    path = folder / name
    target = Path(os.path.realpath(path))
    roots = [Path(os.path.realpath(folder))]
    here = Path(os.path.abspath(folder))  # noqa: PTH100 (links stay)
    for snapshot in (here, here.parent):  # a part of a Composite stands one folder deeper
        if snapshot.parent.name == "snapshots":
            roots.append(Path(os.path.realpath(snapshot.parent.parent / "blobs")))
    if not any(target.is_relative_to(root) for root in roots):
        raise ValueError(f"{path}: a link to {target}, which is outside the folder")
    return path


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


def _shown(value: Any) -> str:
    """A value from a file, short enough for an error message."""
    text = repr(value) if isinstance(value, dict) else json.dumps(value, default=repr)
    if isinstance(value, str):
        text = ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
