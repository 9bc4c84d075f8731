"""repeng and llama.cpp: control vectors as steering vectors, and back, through objects and through GGUF files.

A control vector adds coefficient·direction to the output of each of its decoder layers: the site residual, with the
coefficient as the strength of `af.patch`. Layers have one number everywhere: `directions[n]` of repeng, the tensor
`direction.n` of a file and layer n here are the output of the n-th decoder layer, counted from 0 (llama.cpp adds
`direction.n` at the end of its layer n, but has none for layer 0 and refuses a file with `direction.0`;
common/common.cpp and src/llama-adapter.cpp).

`load_gguf` and `save_gguf` need the package `gguf` alone; the two others need repeng. What repeng chooses where it
applies a vector is not part of it: `normalize=True` and `operator=` have no counterpart, and `ControlModel`'s
`layer_ids` are the layers of the `SteerVec`. repeng leaves left padding out, which no real token can see.
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
    """repeng's control vector as a `SteerVec` at the site residual; layers without a direction are not steered.

    Args:
        vector: its `directions` hold [d] by layer; negative layers count from the end. Kept in float32.
        model: the causal language model of Hugging Face, as it was before `ControlModel` wrapped its layers.

    Raises:
        ImportError: repeng is missing or of another version.
        TypeError, ValueError: made for another type of model, of another width, a layer that the model does not have.

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
        ImportError: repeng is missing or of another version.
        TypeError, ValueError: what a control vector cannot say: another site, positions, a stack.
    """
    require("repeng")
    from repeng import ControlVector

    directions = {layer: value.numpy() for layer, value in whole_vectors(steer_vec, ["residual"], "repeng").items()}
    return ControlVector(model_type=steer_vec.location.model.model_type, directions=directions)


def load_gguf(path: str | os.PathLike[str], model: Any, *, model_type: str | None = None) -> SteerVec:
    """A control vector's file, of repeng or llama.cpp, as a `SteerVec` at the site residual.

    Args:
        path: its tensors `direction.n` are float32 [d] (float16 and float64 are read too); others are passed over.
        model: a causal language model of Hugging Face.
        model_type: the hint `controlvector.model_hint` that the file must have; None: the model's own type, which is
            what repeng writes. llama.cpp writes its own name: "llama" for a Mistral model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no GGUF file or a damaged one, no control vector, one for another type of model, of another width,
            or with quantised tensors.
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
        raise ValueError(f"{path}: has no {_HINT}, so it is not known which model it is for")
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
    """Write a control vector's file that repeng and llama.cpp read, whole or not at all.

    Args:
        steer_vec: at the site residual, for every token, unstacked. A vector of zeros at layer 0 is left out.
        path: as a rule with the ending .gguf.

    Raises:
        TypeError, ValueError: what the format cannot say: another site, positions, a stack, a vector at layer 0.
    """
    from gguf import GGUFWriter

    directions = whole_vectors(steer_vec, ["residual"], "a control vector")
    if 0 in directions and directions.pop(0).any():
        raise ValueError(
            "steer_vec: steers layer 0; llama.cpp has no vector for it and refuses a file with direction.0"
        )
    if not directions:
        raise ValueError("steer_vec: has no layer but 0, for which llama.cpp has no vector")
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
