"""Requests with options where vLLM would drop them are refused before they reach a route; others arrive as sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import tracemalloc
from typing import Any

import pytest

from actscale_fast.integrations.vllm.dropped_arguments import why_dropped
from actscale_fast.integrations.vllm.misplaced_options import RefuseMisplaced, route_of, why_misplaced

CHAT = {"model": "m", "messages": [{"role": "user", "content": "actscale_strength: what is it?"}]}


class App:
    """An application that reads the whole body and answers 200."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.later: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                break
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        self.later.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"answer", "more_body": True})
        await send({"type": "http.response.body", "body": b""})


JSON = "application/json"


def post(
    app: Any,
    path: str,
    body: bytes,
    *,
    pieces: int = 1,
    kind: str = JSON,
    query: str = "",
    root: str = "",
) -> tuple[int, Any]:
    """The status and the body of the answer."""
    size = -(-len(body) // pieces) or 1
    waiting = [
        {"type": "http.request", "body": body[at : at + size], "more_body": at + size < len(body)}
        for at in range(0, max(len(body), 1), size)
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    scope = {
        "type": "http", "method": "POST", "path": root + path, "root_path": root, "query_string": query.encode(),
        "headers": [(b"Content-Type", kind.encode())],
    }  # fmt: skip
    asyncio.run(RefuseMisplaced(app)(scope, receive, send))
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(content) if sent[0]["status"] == 400 else content


XARGS = {"vllm_xargs": {"actscale": "a", "actscale_strength": 1}}
ARRIVE = [
    ("/v1/completions", {"prompt": "actscale", **XARGS}),
    ("/v1/chat/completions", {**CHAT, **XARGS}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions/batch", {**CHAT, **XARGS}),
    ("/v1/responses", {"input": "x", **XARGS}),
    ("/v1/messages", {**CHAT, **XARGS}),
    ("/invocations", {**CHAT, **XARGS}),
    ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {"extra_args": {"actscale": "a"}}}),
    ("/generative_scoring", {"query": "x", **XARGS}),  # refused by dropped_arguments
    ("/v1/chat/completions/render", {**CHAT, **XARGS}),
    ("/v1/messages/count_tokens", {**CHAT, **XARGS}),
    ("/cohere/v2/chat", CHAT),
    ("/cohere/v2/chat", {**CHAT, "note": "é"}),
    ("/v1/chat/completions", {**CHAT, "tools": [{"function": {"parameters": {"actscale": {"type": "string"}}}}]}),
    ("/v1/chat/completions", {**CHAT, "metadata": {"actscale_experiment": "7", "Actscale-Strength": "x"}}),
    ("/v1/responses", {"input": "x", "previous_input_messages": [{"actscale": 1}]}),
    ("/v1/systemone", {"state": {"actscale": 1}, "questions": [{"actscale": 1}], **XARGS}),
    ("/inference/v1/generate", {"sampling_params": {"structured_outputs": {"json": {"actscale": {}}}}}),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": [{"input": {"actscale": 1}}]}]}),
]


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize(("path", "body"), ARRIVE, ids=lambda value: value if isinstance(value, str) else "")
def test_what_a_route_reads_arrives_as_it_came(path: str, body: dict[str, Any], pieces: int) -> None:
    app, sent = App(), json.dumps(body).encode()
    assert post(app, path, sent, pieces=pieces) == (200, b"answer")
    assert app.bodies == [sent]
    assert app.later == [{"type": "http.disconnect"}]


REFUSED = [
    ("/v1/completions", {"actscale": "a"}, "got actscale as a field of the request, expected it inside vllm_xargs"),
    ("/v1/chat/completions", {"actscale": "a", "actscale_strength": 1}, "got actscale, actscale_strength as a field"),
    ("/v1/chat/completions", {"extra_body": XARGS}, "inside extra_body.vllm_xargs, expected it inside vllm_xargs"),
    ("/v1/chat/completions", {"sampling_params": {"extra_args": {"actscale": "a"}}}, "expected it inside vllm_xargs"),
    ("/v1/chat/completions", {"metadata": {"actscale_strength": "a"}}, "got actscale_strength inside metadata"),
    ("/v1/chat/completions", {"more": {"Actscale-Strength": "a"}}, "got Actscale-Strength inside more"),
    ("/v1/chat/completions", {"more": {"metadata": {"Actscale-x": "a"}}}, "got Actscale-x inside more.metadata"),
    ("/v1/chat/completions", {"extra_body": {"input": XARGS}}, "inside extra_body.input.vllm_xargs, expected"),
    ("/v1/completions", {"vllm_xargs": {"text": {"actscale": "a"}}}, "inside vllm_xargs.text, expected"),
    ("/v1/chat/completions", {"chat_template_kwargs": {"actscale": "a"}}, "inside chat_template_kwargs, expected"),
    ("/v1/completions", {"extra": [{"actscale": "a"}]}, "inside extra, expected"),
    ("/v1/completions", {"vllm_xargs": {"more": {"actscale": "a"}}}, "inside vllm_xargs.more"),
    ("/v1/messages", {**CHAT, "actscale": "a"}, "inside vllm_xargs"),
    ("/inference/v1/generate", {"token_ids": [1], **XARGS}, "expected it inside sampling_params.extra_args"),
    ("/inference/v1/generate", {"sampling_params": {"actscale": "a"}}, "inside sampling_params, expected"),
    ("/cohere/v2/chat", {**CHAT, **XARGS}, "on another route: /cohere/v2/chat cannot steer requests"),
    ("/v1/score", XARGS, "/v1/score cannot steer requests"),
]


@pytest.mark.parametrize("pieces", [1, 9])
@pytest.mark.parametrize(("path", "body", "reason"), REFUSED)
def test_what_a_route_would_drop_is_refused(path: str, body: dict[str, Any], reason: str, pieces: int) -> None:
    app = App()
    status, answer = post(app, path, json.dumps(body).encode(), pieces=pieces, root="/proxy")
    assert status == 400
    assert reason in answer["error"]["message"]
    assert answer["message"] == answer["error"]["message"]
    assert answer["error"]["code"] == 400
    assert app.bodies == []


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/v1/completions", '{"vllm_xargs": {"actscale": "a", "actscale": "b"}}', "got actscale more than once"),
        ("/v1/completions", '{"vllm_xargs": {"actscale": "a"}, "vllm_xargs": {}}', "got vllm_xargs more than once"),
        ("/v1/completions", '{"vllm_xargs": null, "vllm_xargs": {"actscale": "a"}}', "got vllm_xargs more than once"),
        (
            "/inference/v1/generate",
            '{"sampling_params": {"extra_args": {"actscale": "a"}, "extra_args": {"x": 1}}}',
            "got extra_args more than once",
        ),
        ("/v1/completions", '{"note": {"actscale": "a"}, "note": 1}', "got actscale inside note"),
    ],
)
def test_a_key_that_comes_twice_hides_nothing(path: str, body: str, reason: str) -> None:
    assert reason in (why_misplaced(path, body) or "")
    assert why_misplaced("/v1/completions", '{"vllm_xargs": {"a": 1, "a": 2}, "vllm_xargs": {}}') is None


def test_a_reason_is_short() -> None:
    body = json.dumps({f"actscale_{number}{'x' * 200}": 1 for number in range(10_000)})
    reason = why_misplaced("/v1/completions", body)
    assert reason is not None
    assert "and 9995 more as a field of the request" in reason
    assert len(reason) < 600
    deep: Any = {"actscale": "a"}
    for number in range(100, 0, -1):
        deep = {f"k{number}": deep}
    reason = why_misplaced("/v1/completions", json.dumps(deep))
    assert reason == f"actscale: got actscale inside k1.k2.k3.….k98.k99.k100, expected it inside {'vllm_xargs'}"
    assert "inside 1.2.3.4.5.6, " in (why_misplaced("/v1/completions", _nested(6)) or "")
    assert "inside 1.2.3.….5.6.7, " in (why_misplaced("/v1/completions", _nested(7)) or "")


def _nested(depth: int) -> str:
    return "".join(f'{{"{number + 1}": ' for number in range(depth)) + '{"actscale": 1}' + "}" * depth


def test_deep_bodies_take_no_more_memory_than_shallow_ones() -> None:
    wide = json.dumps({str(number): {"x": 1} for number in range(3000)})

    def peak(depth: int) -> int:
        body = '{"x": ' * depth + wide + "}" * depth
        tracemalloc.start()
        try:
            assert why_misplaced("/v1/completions", body) is None
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2)
    assert peak(500) < 1.5 * peak(5)  # with the path of each object, 12 MB more


def test_a_long_body_is_parsed_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread())
        return why_misplaced(*args)

    monkeypatch.setattr("actscale_fast.integrations.vllm.misplaced_options.why_misplaced", noted)
    for size in (10, 300_000):
        body = json.dumps({"prompt": "x" * size, "actscale": "a"}).encode()
        assert post(App(), "/v1/completions", body, pieces=5)[0] == 400
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


@pytest.mark.parametrize("root", ["/", "", "/proxy", "/v1"])
def test_a_prefix_is_taken_off_as_by_the_router(root: str) -> None:
    body = {**CHAT, **XARGS}
    for path in ("/v1/chat/completions", root.rstrip("/") + "/v1/chat/completions"):
        if (root, path) != ("/v1", "/v1/chat/completions"):
            assert route_of({"path": path, "root_path": root}) == "/v1/chat/completions"
    assert route_of({"path": "/v1/chat/completions", "root_path": "/v1"}) == "/chat/completions"
    assert route_of({"path": "/proxying", "root_path": "/proxy"}) == "/proxying"
    assert post(App(), "/v1/chat/completions", json.dumps(body).encode(), root=root.rstrip("/"))[0] == 200


def test_a_route_that_reads_no_body_does_not_wait_for_one() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def stalled() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/nowhere", "headers": []}
    asyncio.run(asyncio.wait_for(RefuseMisplaced(app)(scope, stalled, send), 5))
    assert [message.get("status") for message in sent] == [404, None]


def test_what_a_route_says_after_a_refusal_is_dropped() -> None:
    class Stubborn(App):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            for _ in range(2):
                with contextlib.suppress(Exception):
                    await super().__call__(scope, receive, send)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise RuntimeError("of the route")

    status, answer = post(Stubborn(), "/v1/completions", b'{"actscale": "a"}')
    assert (status, "as a field of the request" in answer["message"]) == (400, True)
    with pytest.raises(RuntimeError, match="of the route"):
        post(Stubborn(), "/v1/completions", b"{}")


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 11, 40])
@pytest.mark.parametrize(
    "body",
    [
        b'{"\\u0061ctsc\\u0041le": "a"}',  # JSON's escapes
        '{"actscale": "a"}'.encode("utf-16"),
        '{"actscale": "a"}'.encode("utf-32-be"),
        b'{"ACTSCALE": "a"}',
    ],
    ids=["escaped", "utf-16", "utf-32", "capitals"],
)
def test_no_spelling_of_a_key_passes(body: bytes, pieces: int) -> None:
    assert post(App(), "/cohere/v2/chat", body, pieces=pieces)[0] == 400


def test_the_query_of_an_address_is_refused() -> None:
    status, answer = post(App(), "/v1/completions", b"{}", query="a=1&actscale=capitals")
    assert (status, "got actscale in the query of the address" in answer["message"]) == (400, True)
    assert post(App(), "/v1/completions", b"{}", query="q=actscale")[0] == 200


def test_other_bodies_are_left_to_the_route() -> None:
    for body, kind in (
        (b"", "application/json"),
        (b'{"actscale": ', "application/json"),
        (b"[" * 100_000 + b'"actscale"', "application/json"),
        (b"actscale=a", "multipart/form-data; boundary=x"),
    ):
        app = App()
        assert post(app, "/v1/completions", body, kind=kind) == (200, b"answer")
        assert app.bodies == [body]


def test_a_client_that_leaves_early_is_passed_on() -> None:
    app = App()

    async def run() -> None:
        waiting: list[dict[str, Any]] = [
            {"type": "http.request", "body": b'{"actscale"', "more_body": True},
            {"type": "http.disconnect"},
        ]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}

        async def receive() -> dict[str, Any]:
            return waiting.pop(0) if waiting else {"type": "http.disconnect"}

        async def send(message: Any) -> None: ...

        await RefuseMisplaced(app)(scope, receive, send)

    asyncio.run(run())
    assert app.bodies == [b'{"actscale"']


def test_a_message_of_a_websocket_ends_the_connection() -> None:
    good = {"type": "websocket.receive", "text": json.dumps({"type": "session.update", "model": "m"})}
    bad = {"type": "websocket.receive", "text": json.dumps({"type": "session.update", "vllm_xargs": {"actscale": "a"}})}
    waiting, got, sent = [{"type": "websocket.connect"}, good, bad], [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] != "websocket.disconnect":
            got.append(message)
        assert (await receive())["type"] == "websocket.disconnect"
        await send({"type": "websocket.send", "text": "late"})  # a task that generates beside the one that reads
        await send({"type": "websocket.close", "code": 1000})

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    asyncio.run(RefuseMisplaced(app)(scope, receive, send))
    assert [message["type"] for message in got] == ["websocket.connect", "websocket.receive"]
    assert [message["type"] for message in sent] == ["websocket.send", "websocket.close"]
    assert "/v1/realtime cannot steer requests" in json.loads(sent[0]["text"])["error"]

    waiting, got, sent = [{"type": "websocket.connect"}], [], []
    asyncio.run(RefuseMisplaced(app)({**scope, "query_string": b"actscale=a"}, receive, send))
    assert (got, [message["type"] for message in sent]) == ([], ["websocket.close"])


class Parsed:
    """A request as pydantic keeps it."""

    __slots__ = ("__dict__", "model_extra")

    def __init__(self, unknown: dict[str, Any], known: dict[str, Any]) -> None:
        self.model_extra = unknown
        self.__dict__.update(known)


@pytest.mark.parametrize(
    ("unknown", "known", "reason"),
    [
        ({"actscale": "a"}, {}, "got actscale as a field of the request, expected it inside vllm_xargs"),
        ({"extra_body": {"vllm_xargs": {"actscale": "a"}}}, {}, "inside extra_body.vllm_xargs, expected"),
        ({"extra": [{"more": ({"actscale": "a"},)}]}, {}, "inside extra.more, expected"),
        ({}, {"metadata": {"actscale": "a"}}, "inside metadata, expected"),
        ({}, {"chat_template_kwargs": {"actscale": "a"}}, "inside chat_template_kwargs, expected"),
        ({"note": {1: {"x": 1}}, "messages": [{"actscale": 1}]}, {"metadata": {"actscale_x": "a"}}, None),
        ({"vllm_xargs": {"actscale": "a"}}, {}, None),  # where nothing is generated; `vllm_xargs` is known elsewhere
        ({}, {"vllm_xargs": {"actscale": "a"}}, None),
    ],
)
def test_fields_of_a_request_without_an_address(unknown: Any, known: Any, reason: str | None) -> None:
    """As from `vllm run-batch`, which has no routes."""
    why = why_dropped("OpenAIServingChat", Parsed(unknown, known))
    assert why == reason if reason is None else reason in (why or "")


def test_a_lifespan_passes() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(RefuseMisplaced(app)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]


def test_a_large_body_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    monkeypatch.setattr("actscale_fast.integrations.vllm.misplaced_options.why_misplaced", lambda *_: parsed.append(1))
    app, body = App(), json.dumps({**CHAT, "messages": [{"content": "x" * 2_000_000}]}).encode()
    assert post(app, "/v1/chat/completions", body, pieces=31)[0] == 200
    assert (app.bodies, parsed) == ([body], [])


def test_a_body_that_is_not_an_object_is_left_to_the_route() -> None:
    for body in ('"actscale"', "3", '["actscale"]'):
        assert why_misplaced("/v1/completions", body) is None
