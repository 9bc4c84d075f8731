"""AISteer360: its files of steering vectors (`.svec`) as `SteerVec`, and back, without the library.

The format, as read in IBM/AISteer360 at 1d7c84314b19341ac78c9ae4ee1eabf4e2f58632, file
aisteer360/algorithms/state_control/_common/steering_vector.py: a JSON object with `model_type`, `directions` {layer:
[K, D] nested lists, or [D]}, and where applicable `num_heads`, `head_dim`, `explained_variances` {layer: float} and
`probe_accuracies` {"layer:head": float}. The meaning of K and D depends on the control that uses them:

| kind | control | shape | where | here |
|---|---|---|---|---|
| "direction" | CAA, CAST | [1, d] | output of layer n | residual n, every token |
| "positions" | ActAdd | [T, d] | input of layer n, the prompt's token t | residual n − 1, position t |
| "heads" | ITI | [heads, head_dim] | input of the attention's output projection | head n, every token |

The basis of angular steering, [2, d], is the plane of a rotation, not a vector.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import atomic_path
from .._json import LARGEST, parsed, read_limited
from .._suggestions import did_you_mean
from ..architectures.location import check_layers
from ..interventions import SteerVec
from ._vectors import by_layer, check_vector, from_vectors

KINDS = ("direction", "positions", "heads")


def load(
    path: str | os.PathLike[str],
    model: Any,
    *,
    kind: str | None = None,
    layers: Iterable[int] | None = None,
    top_heads: int | None = None,
) -> SteerVec:
    """Read a file as a `SteerVec`; the control's multiplier (alpha in ITI) is the strength of `af.patch`.

    Args:
        path: the file; ".svec" is added if it is missing, as the library does.
        model: a causal language model of Hugging Face.
        kind: as in the table above. None: what `save` wrote into the file (under a key that the library ignores),
            otherwise "heads" if the file has num_heads, and "direction" if every K is 1.
        layers: the layers of the file to use, in its own numbers; None: all. CAA and ActAdd use one of them.
        top_heads: for kind "heads", keep this many heads with the highest probe accuracies, as ITI does; None: all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, another type of model, another width, layers that the file does not have, or several
            directions per layer without a `kind`.
    """
    path = _named(path)
    try:
        data = parsed(read_limited(path, LARGEST), finite=False)
        model_type, per_head = str(data["model_type"]), data.get("num_heads") is not None
        kind = kind or data.get("kind")
        directions = {
            int(key): torch.tensor(value, dtype=torch.float32, device="cpu")
            for key, value in data["directions"].items()
        }
        directions = {layer: value[None] if value.dim() == 1 else value for layer, value in directions.items()}
        accuracies = {tuple(map(int, key.split(":"))): float(v) for key, v in data.get("probe_accuracies", {}).items()}
        if not directions or any(value.dim() != 2 for value in directions.values()):
            raise ValueError("no directions [K, D]")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged or not a steering vector ({type(error).__name__}: {error})") from None
    if kind not in (None, *KINDS):
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    if layers is not None:
        wanted = list(layers)
        if missing := [layer for layer in wanted if layer not in directions]:
            raise ValueError(f"layers: got {missing[0]}, expected some of {sorted(directions)}, which {path} has")
        directions = {layer: directions[layer] for layer in wanted}
    several = {len(value) for value in directions.values()}
    if kind is None and not per_head and several != {1}:
        raise ValueError(
            f"kind: {path} holds {max(several)} directions per layer: either one for each token ('positions') or the"
            " basis of angular steering, which is not a vector"
        )
    kind = kind or ("heads" if per_head else "direction")
    if top_heads is not None:
        _keep_top(directions, accuracies, top_heads, kind)
    try:
        if kind == "heads":
            return from_vectors(
                {n: value[None] for n, value in directions.items()}, model, "head", model_type=model_type
            )
        if kind == "direction":
            return from_vectors({n: value[:, None] for n, value in directions.items()}, model, model_type=model_type)
        if 0 in directions:
            raise ValueError("layer 0: its input is the embedding's output, which is not a site; choose other `layers`")
        inputs = {n - 1: value[:, None] for n, value in directions.items()}
        return from_vectors(inputs, model, positions=range(max(several)), model_type=model_type)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def save(steer_vec: SteerVec, path: str | os.PathLike[str]) -> Path:
    """Write a file that AISteer360 reads.

    Args:
        steer_vec: unstacked; at the site residual for every token ("direction") or for positions 0 … T − 1 of the
            prompt ("positions"), or at the site head for every token ("heads").
        path: ".svec" is added if it is missing, as the library does.

    Returns:
        The file's path.

    Raises:
        TypeError, ValueError: another site, other positions, a stack.
    """
    check_vector(steer_vec)
    location, values = steer_vec.location, by_layer(steer_vec)  # [P, H, D]
    data: dict[str, Any] = {"model_type": location.model.model_type}
    if location.site == "head" and location.positions is None:
        directions = {layer: value[0] for layer, value in values.items()}
        data |= {"kind": "heads", "num_heads": location.n_heads, "head_dim": location.width}
    elif location.site == "residual" and location.positions is None:
        data["kind"] = "direction"
        directions = {layer: value[:, 0] for layer, value in values.items()}
    elif location.site == "residual" and location.positions == tuple(range(location.n_slots)):
        data["kind"] = "positions"
        directions = {layer + 1: value[:, 0] for layer, value in values.items()}
        check_layers(directions, location.model.n_layers)  # the last layer's output is not the input of a layer
    else:
        raise ValueError(
            f"steer_vec: got site {location.site!r}, positions {location.positions}, generated {location.generated};"
            " AISteer360 has residual for every token or for positions 0, 1, …, and head for every token"
        )
    data["directions"] = {str(layer): value.tolist() for layer, value in directions.items()}
    path = _named(path)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data), encoding="utf-8")
    return path


def _keep_top(
    directions: dict[int, Tensor], accuracies: dict[tuple[int, ...], float], top_heads: int, kind: str
) -> None:
    """Set all heads to zero except those with the highest accuracies; among equals the first in the file is kept."""
    if kind != "heads" or not 1 <= top_heads <= len(accuracies):
        raise ValueError(f"top_heads: got {top_heads} of kind {kind!r} with {len(accuracies)} probe accuracies")
    best = set(sorted(accuracies, key=accuracies.__getitem__, reverse=True)[:top_heads])
    for layer, value in directions.items():
        for head in range(len(value)):
            if (layer, head) not in best:
                value[head] = 0


def _named(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".svec" else path.with_name(f"{path.name}.svec")
