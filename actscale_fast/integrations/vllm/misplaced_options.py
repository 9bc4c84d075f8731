"""HTTP requests with `actscale…` keys where no route reads them are refused, not answered by the unsteered model.

Many of vLLM's routes drop the fields that they do not know. So a request body is looked at before it reaches its route.
Only a body in which the letters occur is parsed here; the others are handed on as they came. Keys inside the content of
a request (its messages, tools, schemas) are the client's own and are left alone.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from .request_options import NAME, mentions

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
#: Fields whose values are content, with keys of the client's own.
_CONTENT = {
    "messages", "system", "input", "prompt", "instructions", "tools", "tool_choice", "functions", "response_format",
    "structured_outputs", "text", "output_config", "documents", "query", "items", "features", "content_parts",
    "chat_template_kwargs",
}  # fmt: skip
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
#: JSON may write letters as escapes; these are the ones of ASCII's letters.
_ESCAPED_LETTER = re.compile(rb"\\u00[4-7]")
_LONGEST = max(len(NAME), 6)


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
        route = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))
        if mentions(query):
            reason = _reason(route, (), [key for key in query if mentions({key: None})], "in the query of the address")
            await (_refuse(send, reason) if scope["type"] == "http" else _close(receive, send, reason))
        elif scope["type"] == "websocket":
            await self.app(scope, _WatchedMessages(route, receive, send), send)
        elif scope["method"] in ("GET", "HEAD", "OPTIONS") or route.endswith(_NOTHING_GENERATED) or _is_form(scope):
            await self.app(scope, receive, send)
        else:
            await self._with_body(route, scope, receive, send)

    async def _with_body(self, route: str, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        # Each of vLLM's routes waits for the whole body too, so nothing starts later, and nothing is copied.
        held: collections.deque[Message] = collections.deque()
        scan = _Scan()
        while True:
            held.append(await receive())
            scan.add(held[-1].get("body", b""))
            if held[-1]["type"] != "http.request" or not held[-1].get("more_body", False):
                break
        if scan.found and (reason := why_misplaced(route, b"".join(part.get("body", b"") for part in held))):
            await _refuse(send, reason)
            return

        async def again() -> Message:
            return held.popleft() if held else await receive()

        await self.app(scope, again, send)


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
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    read = _READ.get(route, ())
    for at, keys in _places(content):
        if not read or at != read:
            where = "as a field of the request" if not at else f"inside {'.'.join(at)}"
            return _reason(route, read, keys, where)
    return None


def _reason(route: str, read: tuple[str, ...], keys: list[str], where: str) -> str:
    expected = f"inside {'.'.join(read)}" if read else f"on another route: {route or '/'} cannot steer requests"
    return f"{NAME}: got {', '.join(sorted(key[:80] for key in keys))} {where}, expected it {expected}"


def _places(content: Any) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """The path and the keys of each object of a request that has keys of this plug-in."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), content)]
    while waiting:
        at, value = waiting.pop()
        if isinstance(value, list):
            waiting += [(at, one) for one in value if isinstance(one, list | dict)]
        elif isinstance(value, Mapping):
            if keys := [key for key in value if mentions({key: None})]:
                yield at, keys
            waiting += [
                ((*at, key[:80]), one)
                for key, one in value.items()
                if isinstance(one, list | dict) and key not in _CONTENT
            ]


class _WatchedMessages:
    """The messages of a WebSocket; one with options of this plug-in is answered by an error and ends the connection."""

    def __init__(self, route: str, receive: Receive, send: Send) -> None:
        self.route, self.receive, self.send = route, receive, send

    async def __call__(self) -> Message:
        message = await self.receive()
        text = message.get("text") or message.get("bytes") or b""
        body = text.encode() if isinstance(text, str) else text
        scan = _Scan()
        scan.add(body)
        reason = why_misplaced(self.route, body) if scan.found else None
        if reason is None:
            return message
        event = {"type": "error", "error": reason, "code": "invalid_request"}  # as vLLM's own
        await self.send({"type": "websocket.send", "text": json.dumps(event)})
        await self.send({"type": "websocket.close", "code": 1008, "reason": "actscale"})
        return {"type": "websocket.disconnect", "code": 1008, "reason": "actscale"}


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
