"""HTTP requests with `actscale…` keys where no route reads them are refused, not answered by the unsteered model.

Many of vLLM's routes drop the fields that they do not know. So a request body is looked at while its route reads it,
and the route does not get the end of one that is refused. A body is parsed here only where the letters "actscale"
occur, in capitals or not, where JSON's escapes of ASCII letters occur, or where the text may be UTF-16 or UTF-32. Keys
inside the content of a request (its messages, tools, schemas) are the client's own and are left alone.
"""

from __future__ import annotations

import asyncio
import collections
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl

from .request_options import NAME, OPTIONS, is_option

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

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
#: The ends of routes that generate nothing: they may be sent the body of a request that will be steered.
_NOTHING_GENERATED = ("/count_tokens", "/tokenize", "/detokenize", "/render", "/derender")
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
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
#: JSON may write letters as escapes; these are the ones of ASCII's letters.
_ESCAPED_LETTER = re.compile(rb"\\u00[4-7]")
_LONGEST = max(len(NAME), 6)
_PARSED_AT_ONCE = 256 * 1024  # bytes; the event loop goes on while a longer body is parsed
_SHOWN_KEYS, _SHOWN_STEPS, _SHOWN_LETTERS = 5, 3, 80

_CONTAINERS = (list, tuple, dict)
_DISCONNECT = {"type": "websocket.disconnect", "code": 1008, "reason": "actscale"}

#: A JSON object, as its pairs: a key may come twice.
_Pairs = tuple[tuple[str, Any], ...]


class RefuseMisplaced:
    """ASGI middleware that refuses requests with options of this plug-in where they would be dropped.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        route = route_of(scope)
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        if keys := [key for key, _ in query if is_option(key)]:
            reason = _reason(route, (), keys, "in the query of the address")
            await (_refuse(send, reason) if scope["type"] == "http" else _close(receive, send, reason))
        elif scope["type"] == "websocket":
            messages = _WatchedMessages(route, receive, send)
            await self.app(scope, messages.receive, messages.send)
        elif scope["method"] in ("GET", "HEAD", "OPTIONS") or route.endswith(_NOTHING_GENERATED) or _is_form(scope):
            await self.app(scope, receive, send)
        else:
            await _WatchedBody(route, receive, send).run(self.app, scope)


def route_of(scope: Mapping[str, Any]) -> str:
    """The path of a request without the application's prefix, by the same rule as Starlette's, and without a last "/".

    Args:
        scope: the ASGI scope.
    """
    path, root = scope["path"], scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) :][:1] in ("", "/"):
        path = path[len(root) :]
    return str(path).rstrip("/")


class _RefusedError(Exception):
    """Raised in a route that waits for a body which has been refused."""


class _WatchedBody:
    """The body of a request, looked at while its route reads it.

    A route that reads no body is not kept waiting for one. A route that reads it never gets the last piece of a body
    that is refused, so that it cannot have answered by then.
    """

    def __init__(self, route: str, receive: Receive, send: Send) -> None:
        self._route, self._receive, self._send = route, receive, send
        self._pieces: list[bytes] = []
        self._scan = _Scan()
        self._whole = self._refused = self._started = False

    async def run(self, app: App, scope: MutableMapping[str, Any]) -> None:
        try:
            await app(scope, self.receive, self.send)
        except Exception:
            if not self._refused:
                raise

    async def receive(self) -> Message:
        if self._refused:
            raise _RefusedError
        message = await self._receive()
        if self._whole or message["type"] != "http.request":
            return message
        piece = message.get("body", b"")
        self._pieces.append(piece)
        self._scan.add(piece)
        if message.get("more_body", False):
            return message
        self._whole = True
        pieces, self._pieces = self._pieces, []
        if self._scan.found and (reason := await _looked_at(self._route, pieces)):
            self._refused = True
            if not self._started:
                await _refuse(self._send, reason)
            raise _RefusedError
        return message

    async def send(self, message: Message) -> None:
        if not self._refused:
            self._started = True
            await self._send(message)


async def _looked_at(route: str, pieces: list[bytes]) -> str | None:
    """`why_misplaced` of a body in pieces; a long one is parsed in a thread."""
    if sum(map(len, pieces)) <= _PARSED_AT_ONCE:
        return why_misplaced(route, b"".join(pieces))
    return await asyncio.to_thread(lambda: why_misplaced(route, b"".join(pieces)))


class _Scan:
    """Whether a body that comes in pieces may hold a key of this plug-in."""

    def __init__(self) -> None:
        self.found = False
        self._first = self._tail = b""

    def add(self, piece: bytes) -> None:
        if self.found or not piece:
            return
        text = self._tail + piece.lower()
        self._first = (self._first + piece)[:4]
        # A zero among the first bytes: UTF-16 or UTF-32, which JSON may be in.
        self.found = NAME.encode() in text or b"\0" in self._first or bool(_ESCAPED_LETTER.search(text))
        self._tail = text[1 - _LONGEST :]


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
    """Why the fields of a request that vLLM does not know would lose options; None: they hold none.

    Args:
        fields: the unknown fields, with their values as parsed from JSON.
    """
    return _why_misplaced("", tuple(fields.items()), _XARGS, reads=False)


def _pairs(pairs: list[tuple[str, Any]]) -> _Pairs:
    return tuple(pairs)  # in Python, so that other threads take turns


class _Step(NamedTuple):
    """A key on the way to an object, with the one before it."""

    before: _Step | None
    key: str
    depth: int


def _why_misplaced(route: str, content: Any, read: tuple[str, ...], *, reads: bool = True) -> str | None:
    """Why options somewhere in a request would not be read.

    Args:
        route: the path of the request.
        content: a request; objects are mappings or tuples of pairs.
        read: the keys that lead to where the options are expected; empty: nowhere.
        reads: whether what stands there is read.
    """
    waiting: list[tuple[Any, _Step | None, int, bool]] = [(content, None, 0, False)]
    twice: list[str] = []  # of the keys that lead to the options
    while waiting:
        value, step, on_way, labels = waiting.pop()  # on_way: how many keys of `read` led here; -1: another way
        if isinstance(value, list):
            waiting += [(one, step, on_way, labels) for one in value if isinstance(one, _CONTAINERS)]
            continue
        pairs = value if isinstance(value, tuple) else tuple(value.items())
        if keys := [key for key, _ in pairs if (key in OPTIONS if labels else is_option(key))]:
            if not (reads and read and on_way == len(read)):
                return _reason(route, read, keys, _where(step))
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
            keys.append(at.key[:_SHOWN_LETTERS])
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


def _reason(route: str, read: tuple[str, ...], keys: Iterable[str], where: str) -> str:
    on_another = f"on another route: {route[:_SHOWN_LETTERS] or '/'} cannot steer requests"
    expected = f"inside {'.'.join(read)}" if read else on_another
    return f"{NAME}: got {_shown(keys)} {where}, expected it {expected}"


class _WatchedMessages:
    """The messages of a WebSocket; one with options of this plug-in is answered by an error and ends the connection."""

    def __init__(self, route: str, receive: Receive, send: Send) -> None:
        self._route, self._receive, self._send = route, receive, send
        self._closed = False

    async def receive(self) -> Message:
        if self._closed:
            return dict(_DISCONNECT)
        message = await self._receive()
        text = message.get("text") or message.get("bytes") or b""
        body = text.encode() if isinstance(text, str) else text
        scan = _Scan()
        scan.add(body)
        reason = await _looked_at(self._route, [body]) if scan.found else None
        if reason is None:
            return message
        self._closed = True
        event = {"type": "error", "error": reason, "code": "invalid_request"}  # as vLLM's own
        await self._send({"type": "websocket.send", "text": json.dumps(event)})
        await self._send({"type": "websocket.close", "code": 1008, "reason": "actscale"})
        return dict(_DISCONNECT)

    async def send(self, message: Message) -> None:
        if not self._closed:
            await self._send(message)


def _is_form(scope: Mapping[str, Any]) -> bool:
    """Whether the body is a form, whose unknown fields reach `dropped_arguments`."""
    kind = next((value for name, value in scope["headers"] if name.lower() == b"content-type"), b"")
    return bool(kind.decode("latin-1").lower().startswith(_FORMS))


def _error(reason: str) -> dict[str, Any]:
    """An error that the clients of OpenAI, Anthropic and Cohere each understand."""
    error = {"message": reason, "type": "BadRequestError", "param": None, "code": 400}
    return {"type": "error", "message": reason, "error": error}


async def _refuse(send: Send, reason: str) -> None:
    body = json.dumps(_error(reason)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _close(receive: Receive, send: Send, reason: str) -> None:
    await receive()  # the client's wish to connect, which is refused
    await send({"type": "websocket.close", "code": 1008, "reason": reason[:120]})
