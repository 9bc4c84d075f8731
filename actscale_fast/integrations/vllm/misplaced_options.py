"""HTTP requests with `actscale…` keys where no route reads them are refused, not answered by the unsteered model.

Many of vLLM's routes drop the fields that they do not know. So a request body is looked at while its route reads it,
and the route does not get the end of one that is refused. A body is parsed here only where the letters "actscale"
occur, in capitals or not, where JSON's escapes of ASCII letters occur, or where the text may be UTF-16 or UTF-32. Keys
inside the content of a request (its messages, tools, schemas) are the client's own and are left alone.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from .request_options import NAME, is_option
from .unread_options import reason, why_misplaced

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

#: The ends of routes that generate nothing: they may be sent the body of a request that will be steered.
_NOTHING_GENERATED = ("/count_tokens", "/tokenize", "/detokenize", "/render", "/derender")
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
#: JSON may write letters as escapes; these are the ones of ASCII's letters.
_ESCAPED_LETTER = re.compile(rb"\\u00[4-7]")
_LONGEST = max(len(NAME), 6)
_PARSED_AT_ONCE = 256 * 1024  # bytes; the event loop goes on while a longer body is parsed
_DISCONNECT = {"type": "websocket.disconnect", "code": 1008, "reason": "actscale"}


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
            why = reason(route, (), keys, "in the query of the address")
            await (_refuse(send, why) if scope["type"] == "http" else _close(receive, send, why))
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
        if self._scan.found and (why := await _looked_at(self._route, pieces)):
            self._refused = True
            if not self._started:
                await _refuse(self._send, why)
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
        why = await _looked_at(self._route, [body]) if scan.found else None
        if why is None:
            return message
        self._closed = True
        event = {"type": "error", "error": why, "code": "invalid_request"}  # as vLLM's own
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


def _error(why: str) -> dict[str, Any]:
    """An error that the clients of OpenAI, Anthropic and Cohere each understand."""
    error = {"message": why, "type": "BadRequestError", "param": None, "code": 400}
    return {"type": "error", "message": why, "error": error}


async def _refuse(send: Send, why: str) -> None:
    body = json.dumps(_error(why)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _close(receive: Receive, send: Send, why: str) -> None:
    await receive()  # the client's wish to connect, which is refused
    await send({"type": "websocket.close", "code": 1008, "reason": why[:120]})
