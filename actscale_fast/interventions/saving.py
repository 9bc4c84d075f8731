"""The two files of a saved intervention: its tensors, and a description that knows the tensors' checksum.

Each is written under a temporary name and renamed. A crash between the two renames leaves a checksum that does not
match, which reads as damaged rather than as another intervention.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .._files import atomic_path
from .location import Location

if TYPE_CHECKING:
    from .base import Intervention

FORMAT = 1
TENSORS, DESCRIPTION = "intervention.safetensors", "intervention.json"


def save(intervention: Intervention, folder: Path) -> None:
    """Write both files; raises ValueError before anything is written where a parameter is not finite."""
    intervention.check_finite()
    payload = save_tensors({name: t.detach().cpu().contiguous() for name, t in intervention.saved_tensors().items()})
    made_folder(folder)
    with atomic_path(folder / TENSORS) as temporary:
        temporary.write_bytes(payload)
    write_description(
        folder,
        {
            "class": type(intervention).__name__,
            "module": type(intervention).__module__,
            "n_groups": intervention.n_groups,
            "location": intervention.location.to_dict(),
            "sha256": hashlib.sha256(payload).hexdigest(),
        },
    )


def made_folder(folder: Path) -> Path:
    """The folder, made where it is not there."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder: {folder} is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write `intervention.json`."""
    with atomic_path(folder / DESCRIPTION) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, **description}, indent=1) + "\n", encoding="utf-8")


def read_description(folder: Path) -> dict[str, Any]:
    """What `intervention.json` says; see `base.load_intervention` for the errors."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found, expected a folder written by save_pretrained")
    try:
        description = json.loads(path.read_bytes())
        if not isinstance(description, dict):
            raise ValueError(f"a JSON {type(description).__name__}, expected an object")
        if description.get("format") != FORMAT:
            raise ValueError(f"format {description.get('format')!r}, this version reads {FORMAT}")
        if not isinstance(description.get("class"), str):
            raise ValueError("no class")
        module = description.get("module", "")
        if str(module).startswith("actscale_fast.integrations."):  # of this package, but not imported with it
            importlib.import_module(module)
    except ValueError as error:  # JSON and Unicode errors are ValueErrors
        raise ValueError(f"{path}: damaged or not an intervention ({error})") from None
    return description


def load(folder: Path, description: dict[str, Any]) -> tuple[Location, int | None, dict[str, Tensor]]:
    """(location, number of groups, tensors); see `base.load_intervention` for the errors."""
    path = folder / TENSORS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found, expected a folder written by save_pretrained")
    payload = path.read_bytes()
    try:
        location, n_groups = Location.from_dict(description["location"]), description["n_groups"]
        if n_groups is not None and (type(n_groups) is not int or n_groups < 1):
            raise ValueError(f"n_groups: got {n_groups!r}, expected null or a positive integer")
        checksum = description["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / DESCRIPTION}: damaged or not an intervention ({error})") from None
    if hashlib.sha256(payload).hexdigest() != checksum:
        raise ValueError(f"{path}: damaged or truncated, its checksum is not the one in {DESCRIPTION}")
    try:
        return location, n_groups, load_tensors(payload)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
