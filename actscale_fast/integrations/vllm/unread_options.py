"""Where a request holds `actscale…` keys, and whether its route reads them there.

Two callers: `misplaced_options` with the bodies of HTTP requests, and `dropped_arguments` with requests that vLLM has
parsed. Neither goes into content, whose keys are the client's own.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .request_options import NAME, OPTIONS, is_option

_XARGS, _EXTRA = ("vllm_xargs",), ("sampling_params", "extra_args")
#: Where the options of a request stand, by route. Two of these routes cannot steer, and say so themselves.
_READ = {
    **dict.fromkeys(
        ("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses", "/v1/messages",
         "/v1/audio/transcriptions", "/v1/audio/translations", "/invocations", "/generative_scoring", "/v1/systemone"),
        _XARGS,
    ),
    "/inference/v1/generate": _EXTRA,
}  # fmt: skip
#: Fields of a request whose values are content, with keys of the client's own; of these names only at its top level.
_CONTENT = {
    "messages", "previous_input_messages", "system", "input", "prompt", "instructions", "tools", "tool_choice",
    "functions", "response_format", "structured_outputs", "text", "output_config", "documents", "query", "items",
    "features", "content_parts", "state", "questions",
}  # fmt: skip
#: The same, one level deeper.
_INNER_CONTENT = {("sampling_params", "structured_outputs")}
#: The client's own labels, which may begin with the letters too: only the exact names of options are refused there.
_LABELS = "metadata"
_SHOWN_KEYS, _SHOWN_STEPS, _SHOWN_LETTERS = 5, 3, 80


class _Pairs(tuple[tuple[str, Any], ...]):
    """A JSON object, as its pairs: a key may come twice."""

    __slots__ = ()


_CONTAINERS = (list, tuple, dict)


def why_misplaced(route: str, body: bytes | str) -> str | None:
    """Why a route would not read options that a JSON body holds; None: it reads them, or there are none.

    Args:
        route: the path of the request.
        body: the body. What is not JSON is left to the route, which refuses it.
    """
    try:
        content = json.loads(body, object_pairs_hook=_pairs)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, _CONTAINERS):
        return None
    return _why_misplaced(route, content, _READ.get(route, ()))


def why_unread(fields: Mapping[str, Any]) -> str | None:
    """Why fields of a request would lose options; None: they hold none, or only in `vllm_xargs`.

    Args:
        fields: fields of a parsed request.
    """
    return _why_misplaced("", fields, _XARGS)


def _pairs(pairs: list[tuple[str, Any]]) -> _Pairs:
    return _Pairs(pairs)  # in Python, so that other threads take turns


class _Step(NamedTuple):
    """A key on the way to an object, with the one before it."""

    before: _Step | None
    key: str
    depth: int


def _why_misplaced(route: str, content: Any, read: tuple[str, ...]) -> str | None:
    """Why options somewhere in a request would not be read.

    Args:
        route: the path of the request.
        content: a request; objects are mappings or tuples of pairs.
        read: the keys that lead to where the options are expected; empty: nowhere.
    """
    waiting: list[tuple[Any, _Step | None, int, bool]] = [(content, None, 0, False)]
    twice: list[str] = []  # of the keys that lead to the options
    while waiting:
        value, step, on_way, labels = waiting.pop()  # on_way: how many keys of `read` led here; -1: another way
        if not isinstance(value, dict | _Pairs):
            waiting += [(one, step, on_way, labels) for one in value if isinstance(one, _CONTAINERS)]
            continue
        pairs = value if isinstance(value, _Pairs) else tuple(value.items())
        if keys := [key for key, _ in pairs if (key in OPTIONS if labels else is_option(key))]:
            if not read or on_way != len(read):
                return reason(route, read, keys, _where(step))
            if repeated := twice or [key for key, n in collections.Counter(keys).items() if n > 1]:
                return f"{NAME}: got {_shown(repeated)} more than once in a request, expected it once"
        next_key = read[on_way] if 0 <= on_way < len(read) else None
        if next_key is not None and sum(key == next_key for key, _ in pairs) > 1:
            twice.append(next_key)
        for key, one in pairs:
            if isinstance(one, _CONTAINERS) and not _is_content(step, key):
                depth = 1 if step is None else step.depth + 1
                way = on_way + 1 if key == next_key else -1
                waiting.append((one, _Step(step, key, depth), way, labels or (depth == 1 and key == _LABELS)))
    return None


def _is_content(step: _Step | None, key: str) -> bool:
    if step is None:
        return key in _CONTENT
    return step.depth == 1 and (step.key, key) in _INNER_CONTENT


def _where(step: _Step | None) -> str:
    if step is None:
        return "as a field of the request"
    at: _Step | None = step
    keys: list[str] = []  # the last ones and, behind them, the first ones
    while at is not None:
        if len(keys) < _SHOWN_STEPS or at.depth <= _SHOWN_STEPS:
            keys.append(str(at.key)[:_SHOWN_LETTERS])
        at = at.before
    if step.depth > 2 * _SHOWN_STEPS:
        keys.insert(_SHOWN_STEPS, "…")
    return f"inside {'.'.join(reversed(keys))}"


def _shown(keys: Iterable[str]) -> str:
    """The first keys, each once."""
    different = sorted(set(keys))
    more = len(different) - _SHOWN_KEYS
    shown = ", ".join(key[:_SHOWN_LETTERS] for key in different[:_SHOWN_KEYS])
    return f"{shown} and {more} more" if more > 0 else shown


def reason(route: str, read: tuple[str, ...], keys: Iterable[str], where: str) -> str:
    """What a refusal says.

    Args:
        route: the path of the request.
        read: the keys that lead to where the route reads options; empty: nowhere.
        keys: what was found.
        where: where it was found.
    """
    on_another = f"on another route: {route[:_SHOWN_LETTERS] or '/'} cannot steer requests"
    expected = f"inside {'.'.join(read)}" if read else on_another
    return f"{NAME}: got {_shown(keys)} {where}, expected it {expected}"
