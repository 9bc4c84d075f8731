"""The state of a fit on disk: one safetensors file, written whole or not at all, resumed to the same bits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._files import atomic_path

_FORMAT = "actscale_fast fit 1"
_SAMPLE = 256  # elements of each layer that stand for its weights


@dataclass(slots=True)
class FitState:
    """Everything a step changes."""

    step: int
    tensors: dict[str, Tensor]  # parameters, their Adam moments and step counters
    history: list[dict[str, float]]


def save(path: str | os.PathLike[str], state: FitState, settings: dict[str, Any]) -> None:
    """Write the state and the settings it belongs to."""
    metadata = {
        "format": _FORMAT,
        "settings": json.dumps(settings, sort_keys=True),
        "progress": json.dumps({"step": state.step, "history": state.history}),
    }
    with atomic_path(path) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        save_file(tensors, temporary, metadata=metadata)


def load(path: str | os.PathLike[str], settings: dict[str, Any], expected: dict[str, Tensor]) -> FitState | None:
    """The state in `path`, or None where there is no such file.

    Raises:
        ValueError: a file that is truncated or no checkpoint of a fit, one made with other settings (they are named),
            or one whose tensors do not fit the intervention.
    """
    if not Path(path).exists():
        return None
    if Path(path).is_dir():
        raise ValueError(f"checkpoint: {path} is a folder, expected the path of a file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: {path} is truncated or another kind of file ({error})") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"checkpoint: {path} is not a checkpoint of a fit (format {metadata.get('format')!r})")
    saved = json.loads(metadata["settings"])
    current = json.loads(json.dumps(settings))
    other = [
        f"{name} {saved.get(name)!r}, now {current.get(name)!r}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if other:
        raise ValueError(f"checkpoint: {path} belongs to another fit: {'; '.join(other)}; name another file")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if shapes != wanted:
        raise ValueError(f"checkpoint: {path} holds {shapes}, expected {wanted}")
    progress = json.loads(metadata["progress"])
    return FitState(progress["step"], tensors, progress["history"])


def restore(state: FitState, targets: dict[str, Tensor]) -> None:
    """Copy the state's tensors into `targets`, in place."""
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(state.tensors[name])


def digest(content: Any) -> str:
    """16 hexadecimal digits that stand for JSON content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@torch.no_grad()
def weights_digest(modules: Iterable[nn.Module]) -> str:
    """16 hexadecimal digits that tell models of one shape apart, from evenly spread elements of each module's weight.

    Weights that are not plain tensors in memory (quantised, offloaded) count with their type and shape alone.
    """
    found = hashlib.sha256()
    for module in modules:
        weight = getattr(module, "weight", None)
        found.update(f"{type(module).__name__} {tuple(getattr(weight, 'shape', ()))}".encode())
        if isinstance(weight, Tensor) and type(weight) in (Tensor, nn.Parameter) and not weight.is_meta:
            flat = weight.detach().flatten()
            found.update(flat[:: max(flat.numel() // _SAMPLE, 1)].double().cpu().numpy().tobytes())
    return found.hexdigest()[:16]
