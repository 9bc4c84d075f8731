"""repeng and llama.cpp: control vectors as steering vectors, and back, as objects and as GGUF files.

A control vector adds coefficient·direction to the output of each of its decoder layers: the site residual, with the
coefficient as the strength of `af.patch`. Layer numbers agree: `directions[n]` in repeng, the tensor `direction.n` in a
file and layer n here are the output of the n-th decoder layer, counted from 0 (llama.cpp adds `direction.n` at the end
of its layer n, but refuses a file with `direction.0`: common/common.cpp and src/llama-adapter.cpp).

`load_gguf` and `save_gguf` only need the package `gguf`; the other two functions need repeng. How repeng applies a
vector is not part of it: `normalize=True` and `operator=` have no counterpart, and `ControlModel`'s `layer_ids` are the
layers of the `SteerVec`. repeng does not steer left padding, which no real token can see.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from .._files import atomic_path
from ..interventions import SteerVec
from ._library import require
from ._vectors import from_vectors, whole_vectors

if TYPE_CHECKING:
    from repeng import ControlVector

_ARCHITECTURE = "controlvector"
_HINT = f"{_ARCHITECTURE}.model_hint"


def from_repeng(vector: ControlVector, model: Any) -> SteerVec:
    """repeng's control vector as a `SteerVec` at the site residual, with the layers that have a direction.

    Args:
        vector: its `directions` hold [d] for each layer, negative layers counted from the end.
        model: the Hugging Face causal language model, before `ControlModel` wraps its layers.

    Raises:
        ImportError: repeng is missing or has another version.
        TypeError, ValueError: another type of model, another width, or a layer that the model does not have.

    Example:
        >>> with af.patch(model, from_repeng(vector, model), strength=1.5):
        ...     model.generate(**inputs)
    """
    require("repeng")
    return from_vectors(vector.directions, model, model_type=vector.model_type)


def to_repeng(steer_vec: SteerVec) -> ControlVector:
    """A `SteerVec` as repeng's control vector, float32.

    Args:
        steer_vec: at the site residual, for every token, unstacked.

    Raises:
        ImportError: repeng is missing or has another version.
        TypeError, ValueError: what a control vector cannot express: another site, positions, a stack.
    """
    require("repeng")
    from repeng import ControlVector

    directions = {layer: value.numpy() for layer, value in whole_vectors(steer_vec, ["residual"], "repeng").items()}
    return ControlVector(model_type=steer_vec.location.model.model_type, directions=directions)


def load_gguf(path: str | os.PathLike[str], model: Any, *, model_type: str | None = None) -> SteerVec:
    """Read a control vector of repeng or llama.cpp from a GGUF file, as a `SteerVec` at the site residual.

    Args:
        path: a file with tensors `direction.n`, float32 [d] (or float16, float64); other tensors are ignored.
        model: a causal language model of Hugging Face.
        model_type: the required `controlvector.model_hint` of the file; None: the model's own type, which repeng
            writes. llama.cpp writes its own name, such as "llama" for a Mistral model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file or one that is not GGUF, not a control vector, another type of model, another width,
            or quantised tensors.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {key: bytes(reader.fields[key].parts[-1]).decode() for key in _TEXTS if key in reader.fields}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path}: damaged or not a GGUF file ({error})") from None
    if fields.get("general.architecture") != _ARCHITECTURE:
        raise ValueError(f"{path}: architecture {fields.get('general.architecture')!r}, expected {_ARCHITECTURE!r}")
    if _HINT not in fields:
        raise ValueError(f"{path}: has no {_HINT}, so the model that it is for is unknown")
    if model_type is not None and fields[_HINT] != model_type:
        raise ValueError(f"{path}: its {_HINT} is {fields[_HINT]!r}, expected {model_type!r}")
    directions: dict[int, np.ndarray[Any, Any]] = {}
    for tensor in reader.tensors:
        kind, _, layer = tensor.name.partition(".")
        if kind != "direction":
            continue
        if tensor.data.dtype not in (np.float16, np.float32, np.float64) or not layer.isdecimal():
            raise ValueError(
                f"{path}: tensor {tensor.name} of type {tensor.tensor_type.name}, expected direction.n of F32"
            )
        directions[int(layer)] = np.array(tensor.data)  # not a view of the mapped file
    try:
        return from_vectors(directions, model, model_type=fields[_HINT] if model_type is None else None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


_TEXTS = ("general.architecture", _HINT)


def save_gguf(steer_vec: SteerVec, path: str | os.PathLike[str]) -> None:
    """Write a control vector as a GGUF file that repeng and llama.cpp read.

    Args:
        steer_vec: at the site residual, for every token, unstacked. A vector of zeros at layer 0 is left out.
        path: the file, usually ending in .gguf.

    Raises:
        TypeError, ValueError: what the format cannot express: another site, positions, a stack, a vector at layer 0.
    """
    from gguf import GGUFWriter

    directions = whole_vectors(steer_vec, ["residual"], "a control vector")
    if 0 in directions and directions.pop(0).any():
        raise ValueError(
            "steer_vec: steers layer 0; llama.cpp has no vector for it and refuses a file with direction.0"
        )
    if not directions:
        raise ValueError("steer_vec: only has layer 0, for which llama.cpp has no vector")
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, _ARCHITECTURE)
        try:
            writer.add_string(_HINT, steer_vec.location.model.model_type)
            writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(directions))
            for layer, value in directions.items():
                writer.add_tensor(f"direction.{layer}", value.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
