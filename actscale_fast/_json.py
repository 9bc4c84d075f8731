"""JSON files that detect any changed byte, and JSON that is read within limits.

A sealed file is an object, or a list that begins with one, whose first key is `checksum`: the SHA-256 of the file's own
bytes with zeros in place of these 64 digits. If any byte changes, the two no longer agree.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ._files import naming, regular_size, write_bytes

CHECKSUM = "checksum"
#: Bytes of a description of an intervention; one with a million positions has 15 MiB.
LARGE = 16 << 20
#: Bytes of the history of a fit; one of a million steps has 250 MiB.
LARGEST = 1 << 28
_ZEROS = "0" * 64
_SEAL = re.compile(rb'\s*(?:\[\s*)?\{\s*"checksum": "([0-9a-f]{64})"')


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write readable JSON atomically."""
    write_bytes(path, encoded(content))


def write_sealed(path: str | os.PathLike[str], content: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> bytes:
    """Write JSON whose first key (in a list: that of its first object) is its own checksum; returns the bytes."""
    payload = sealed(content)
    write_bytes(path, payload)
    return payload


def encoded(content: Any) -> bytes:
    """Readable JSON in UTF-8."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def sealed(content: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> bytes:
    """The bytes of a sealed file."""
    if not content and not isinstance(content, Mapping):  # an empty list has no place for it
        return encoded(content)
    first, *rest = [content] if isinstance(content, Mapping) else content
    first = {CHECKSUM: _ZEROS} | {key: value for key, value in first.items() if key != CHECKSUM}
    zeroed = encoded(first if isinstance(content, Mapping) else [first, *rest])
    return zeroed.replace(_ZEROS.encode(), hashlib.sha256(zeroed).hexdigest().encode(), 1)


def read_limited(path: Path, limit: int = LARGE) -> bytes:
    """The bytes of a file that is not larger than `limit`.

    Raises:
        FileNotFoundError, OSError: the file is missing or cannot be read; the message names it.
        ValueError: the file is too large, or is not a regular file.
    """
    size = regular_size(path)
    if size > limit:
        raise ValueError(f"{path}: has {size} bytes, expected at most {limit}")
    try:
        with path.open("rb") as file:
            payload = file.read(size + 1)
    except OSError as error:
        raise naming(error, path) from error
    if len(payload) != size:
        raise ValueError(f"{path}: its size changed while it was read")
    return payload


def parsed(payload: bytes, *, finite: bool = True) -> Any:
    """Parse UTF-8 JSON without repeated keys and, if `finite`, without NaN and infinity.

    Raises:
        ValueError: not such JSON, or nested too deeply.
    """
    strict: dict[str, Any] = {"parse_constant": _refused_constant, "parse_float": _finite_float} if finite else {}
    try:
        return json.loads(payload.decode("utf-8"), object_pairs_hook=_without_repeats, **strict)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parsed_sealed(payload: bytes, *, finite: bool = True) -> tuple[Any, bool]:
    """Parse JSON that may be sealed; returns the content without the checksum, and whether there was one.

    Raises:
        ValueError: a byte has changed since the file was sealed; or as `parsed`.
    """
    found = _SEAL.match(payload)
    if found is None:
        return parsed(payload, finite=finite), False
    start, end = found.span(1)
    if hashlib.sha256(payload[:start] + _ZEROS.encode() + payload[end:]).hexdigest().encode() != found[1]:
        raise ValueError("it does not match its checksum")
    content = parsed(payload, finite=finite)
    (content if isinstance(content, dict) else content[0]).pop(CHECKSUM)
    return content, True


def read_sealed(path: Path, *, finite: bool = True) -> Any:
    """The content of a sealed file, without the checksum; if `finite`, NaN and infinity are refused.

    Raises:
        FileNotFoundError, OSError: the file is missing or cannot be read; the message names it.
        ValueError: the file was changed or is not a sealed file; the message names it.
    """
    payload = read_limited(path, LARGEST)
    try:
        content, is_sealed = parsed_sealed(payload, finite=finite)
        if not is_sealed:
            raise ValueError("it has no checksum: written by an earlier version, or another kind of file")
    except ValueError as error:  # JSON and Unicode errors are ValueErrors
        raise ValueError(f"{path}: damaged ({error})") from None
    return content


def shown(value: Any) -> str:
    """A value from a file, short enough for an error message and with ASCII characters only."""
    text = ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _refused_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:30]} is not finite")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is repeated")
    return content
