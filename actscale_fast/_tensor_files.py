"""safetensors files with a checksum of the whole file inside, whose header is checked before any tensor is read.

A file begins with 8 bytes, the header's length n; n bytes of JSON: {name: {dtype, shape, data_offsets}}; and the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._files import naming, regular_size
from ._json import parsed

#: The checksum's key in a file's metadata.
CHECKSUM = "checksum"
UNSEALED = "0" * 64
_LARGEST_HEADER = 100_000_000  # of the format itself
_CHUNK = 1 << 22
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a safetensors file, consistent with the size of the file."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str]
    raw: bytes
    size: int  # of the file, in bytes


def read_header(path: Path, limit: int = _LARGEST_HEADER) -> Header:
    """The header of a safetensors file.

    Raises:
        FileNotFoundError, OSError: the file is missing or cannot be read; the message names it.
        ValueError: not a safetensors file, a header larger than `limit`, or a file longer or shorter than its header
            says; the caller adds the name of the file.
    """
    size = regular_size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(limit, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise naming(error, path) from error
    content = parsed(raw)
    if not isinstance(content, dict):
        raise ValueError(f"its header is a JSON {type(content).__name__}, expected an object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not an object of strings")
    shapes, dtypes, spans = {}, {}, []
    for name, entry in content.items():
        shapes[name], dtypes[name], span = _entry(name, entry)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes, expected {8 + length + end}")
    return Header(shapes, dtypes, metadata, raw, size)


def _entry(name: str, entry: Any) -> tuple[tuple[int, ...], torch.dtype, tuple[int, int]]:
    """(shape, dtype, first byte and the one after the last) of one tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:80]!r} is not described as a tensor")
    shape, span, kind = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ValueError(f"{name[:80]!r} has the dtype {str(kind)[:20]!r}, expected one of {', '.join(_DTYPES)}")
    if not all(isinstance(values, list) and all(_is_size(value) for value in values) for values in (shape, span)):
        raise ValueError(f"{name[:80]!r} has no shape")
    dtype = _DTYPES[kind]
    if len(shape) > 16 or len(span) != 2 or span[1] - span[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the shape of {name[:80]!r} does not agree with its bytes")
    return tuple(shape), dtype, (span[0], span[1])


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def save_file(tensors: dict[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    """Write tensors as a safetensors file whose metadata holds a checksum of all its bytes.

    The file is written in place. `safetensors.torch.save_file` instead writes a temporary of its own, which stays
    behind if the process is killed, and produces files that only their owner can read.

    Args:
        tensors: by name, on any device; copied to the host one at a time.
        path: the file, which is overwritten.
        metadata: strings by name.
    """
    kinds = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata | {CHECKSUM: UNSEALED}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # tensors begin at a multiple of 8 bytes
    if len(raw) > _LARGEST_HEADER:
        raise ValueError(f"{os.fspath(path)}: its header has {len(raw)} bytes, expected at most {_LARGEST_HEADER}")
    found, place = hashlib.sha256(), _place(raw, UNSEALED)
    assert place is not None
    with Path(path).open("wb") as file:
        for piece in _pieces(raw, tensors):
            found.update(piece)
            file.write(piece)
        file.seek(place)
        file.write(found.hexdigest().encode())


def _pieces(raw: bytes, tensors: dict[str, Tensor]) -> Iterator[Any]:
    """The bytes of a file."""
    yield len(raw).to_bytes(8, "little")
    yield raw
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def check_checksum(path: Path, header: Header) -> None:
    """Raise a ValueError if any byte has changed since the file was written; the caller adds the name of the file."""
    claimed = header.metadata.get(CHECKSUM, "")
    start = _place(header.raw, claimed) if re.fullmatch(r"[0-9a-f]{64}", claimed) else None
    if start is None:
        raise ValueError("it has no checksum")
    if _digest(path, start) != claimed:
        raise ValueError("it does not match its checksum")


def _place(raw: bytes, digits: str) -> int | None:
    """The offset of the checksum's digits. Quotes inside other metadata are escaped, so there is only one match."""
    key = f'"{CHECKSUM}":"'.encode()
    return None if raw.count(key + digits.encode()) != 1 else 8 + raw.index(key + digits.encode()) + len(key)


def _digest(path: Path, start: int) -> str:
    """SHA-256 of a file with the 64 bytes from `start` on replaced by zeros."""
    found = hashlib.sha256()
    for offset, chunk in _chunks(path):
        first, last = max(start - offset, 0), min(start + 64 - offset, len(chunk))
        if first < last:
            chunk[first:last] = b"0" * (last - first)
        found.update(chunk)
    return found.hexdigest()


def _chunks(path: Path) -> Iterator[tuple[int, bytearray]]:
    offset = 0
    try:
        with path.open("rb") as file:
            while chunk := bytearray(file.read(_CHUNK)):
                yield offset, chunk
                offset += len(chunk)
    except OSError as error:
        raise naming(error, os.fspath(path)) from error
