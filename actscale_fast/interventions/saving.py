"""The two files of a saved intervention: its tensors, and a description that knows the tensors' checksum.

Each is written under a temporary name and renamed. A crash between the two renames leaves a checksum that does not
match, which reads as damaged rather than as another intervention.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

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
    payload = save_tensors({name: p.detach().cpu().contiguous() for name, p in intervention.named_parameters()})
    description = {
        "format": FORMAT,
        "class": type(intervention).__name__,
        "n_groups": intervention.n_groups,
        "location": intervention.location.to_dict(),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder: {folder} is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((TENSORS, payload), (DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())):
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)


def load(folder: Path) -> tuple[str, Location, int | None, dict[str, Tensor]]:
    """(class name, location, number of groups, tensors); see `base.load_intervention` for the errors."""
    for name in (DESCRIPTION, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: not found, expected a folder written by save_pretrained")
    payload = (folder / TENSORS).read_bytes()
    try:
        description = json.loads((folder / DESCRIPTION).read_bytes())
        if not isinstance(description, dict):
            raise ValueError(f"a JSON {type(description).__name__}, expected an object")
        if description.get("format") != FORMAT:
            raise ValueError(f"format {description.get('format')!r}, this version reads {FORMAT}")
        location, n_groups = Location.from_dict(description["location"]), description["n_groups"]
        if n_groups is not None and (type(n_groups) is not int or n_groups < 1):
            raise ValueError(f"n_groups: got {n_groups!r}, expected null or a positive integer")
        name, checksum = description["class"], description["sha256"]
    except (ValueError, KeyError, TypeError) as error:  # JSON and Unicode errors are ValueErrors
        raise ValueError(f"{folder / DESCRIPTION}: damaged or not an intervention ({error})") from None
    if hashlib.sha256(payload).hexdigest() != checksum:
        raise ValueError(f"{folder / TENSORS}: damaged or truncated, its checksum is not the one in {DESCRIPTION}")
    try:
        return name, location, n_groups, load_tensors(payload)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS}: not a safetensors file ({error})") from None
