"""`intervention.json`, which describes a saved intervention. It is read as data that a stranger may have written.

It names the class, the location, the model that the intervention was made for and the tensors file with its checksum,
and has a checksum of its own bytes. Format 1, which has none, is still read.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from .._json import LARGE, parsed_sealed, read_limited, sealed, shown
from ..architectures.location import Location
from ..architectures.model_origin import ModelOrigin

T = TypeVar("T")

FORMAT = 2
DESCRIPTION = "intervention.json"
#: The tensors file of format 1.
TENSORS_1 = "intervention.safetensors"
#: Installed packages declare their classes in this group of entry points: `Name = "package.module:Name"`.
ENTRY_POINTS = __name__.rpartition(".")[0]  # actscale_fast.interventions
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMON = {"format", "class"}
#: What a file of format 2 may lack: the strength of an ActScaleModel, and the model, which earlier versions left out.
_OPTIONAL = {"strength", "model"}
_KEYS = {
    (1, False): _COMMON | {"module", "n_groups", "location", "sha256"},
    (1, True): _COMMON | {"parts"},
    (2, False): _COMMON | {"module", "n_groups", "location", "tensors"},
    (2, True): _COMMON | {"parts"},
}


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

    def place(self) -> tuple[Location, int | None]:
        """The location and the number of groups of an intervention at a single location."""
        return self.checked(lambda: (self._location(), _n_groups(self.fields["n_groups"])))

    def _location(self) -> Location:
        origin = ModelOrigin.from_dict(self.fields["model"]) if "model" in self.fields else None
        return replace(Location.from_dict(self.fields["location"]), origin=origin)

    def tensors_file(self) -> tuple[str, str]:
        """The name and the SHA-256 of the tensors file."""
        return self.checked(lambda: _tensors_file(self.fields))

    def class_in(self, classes: dict[str, type[T]]) -> type[T]:
        """The described class: one of `classes`, which importing an entry point's module may add to.

        A file never decides what is imported: its class name is compared with those that installed packages declare.
        """
        name = self.fields["class"]
        if name not in classes:
            found = tuple(importlib.metadata.entry_points(group=ENTRY_POINTS, name=name))
            if len(found) > 1:
                values = ", ".join(entry_point.value for entry_point in found)
                raise ValueError(f"{self.path}: class {name} is declared by several installed packages: {values}")
            for entry_point in found:
                try:
                    entry_point.load()
                except (ImportError, AttributeError) as error:
                    raise ImportError(
                        f"{self.path}: class {name} is declared by {entry_point.value}, which cannot be imported: "
                        f"{error}"
                    ) from error
        if name not in classes:
            raise ValueError(
                f"{self.path}: unknown class {shown(name)}, expected one of {', '.join(sorted(classes))}; "
                "import the module that defines your own class before loading"
            )
        return classes[name]


def description_bytes(fields: dict[str, Any]) -> bytes:
    """The bytes of `intervention.json`."""
    raw = sealed({"format": FORMAT, **fields})
    if len(raw) > LARGE:
        raise ValueError(f"intervention: its description has {len(raw)} bytes, expected at most {LARGE}")
    return raw


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
    fields, is_sealed = parsed_sealed(raw)
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON {type(fields).__name__}, expected an object")
    version = fields.get("format")
    if type(version) is not int or version not in (1, FORMAT):
        raise ValueError(f"format {shown(version)}, this version reads 1 and {FORMAT}")
    if is_sealed != (version > 1):
        raise ValueError("no checksum" if version > 1 else "a checksum, which format 1 does not have")
    name = fields.get("class")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError("no class" if name is None else f"class: got {shown(name)}, expected a name")
    expected = _KEYS[version, name == "Composite"]
    unknown, missing = fields.keys() - expected - (_OPTIONAL if version > 1 else set()), expected - fields.keys()
    if unknown or missing:
        words = [f"missing: {', '.join(sorted(missing))}"] if missing else []
        words += [f"unknown: {shown(sorted(unknown))}"] if unknown else []
        raise ValueError("; ".join(words))
    if not isinstance(fields.get("module", ""), str):
        raise ValueError(f"module: got {shown(fields['module'])}, expected a string")
    if "strength" in fields:
        number("strength", fields["strength"])
    return fields


def number(name: str, value: Any) -> float:
    """A finite number from a file as a float; raises ValueError for anything else."""
    if type(value) not in (int, float) or not abs(value) < 1e300:
        raise ValueError(f"{name}: got {shown(value)}, expected a finite number")
    return float(value)


def checked_sha256(value: Any) -> str:
    """A SHA-256 from a file; raises ValueError for anything else."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"sha256: got {shown(value)}, expected 64 hexadecimal digits")
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
    for snapshot in (here, here.parent):  # a part of a Composite is one folder deeper
        if snapshot.parent.name == "snapshots":
            roots.append(Path(os.path.realpath(snapshot.parent.parent / "blobs")))
    if not any(target.is_relative_to(root) for root in roots):
        raise ValueError(f"{path}: a link to {target}, which is outside the folder")
    return path


def _n_groups(value: Any) -> int | None:
    if value is not None and (type(value) is not int or not 1 <= value < 1 << 31):
        raise ValueError(f"n_groups: got {shown(value)}, expected null or a positive integer")
    return value


def _tensors_file(fields: dict[str, Any]) -> tuple[str, str]:
    if fields["format"] == 1:
        return TENSORS_1, checked_sha256(fields["sha256"])
    told = fields["tensors"]
    if not isinstance(told, dict) or told.keys() != {"file", "sha256"}:
        raise ValueError(f"tensors: got {shown(told)}, expected a file and its sha256")
    digest = checked_sha256(told["sha256"])
    if told["file"] != f"intervention-{digest[:16]}.safetensors":
        raise ValueError(f"tensors: got the file {shown(told['file'])}, expected a name made of its checksum")
    return told["file"], digest
