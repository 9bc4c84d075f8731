"""One server over HTTP: what is steered, what is refused, what is changed while it runs, and 200 requests at once."""

from __future__ import annotations

import asyncio
import json
import random
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import served
import torch
from served import (
    Server,
    answer,
    assert_close,
    assert_right,
    counted,
    expected,
    prompt_of,
    scalars,
    serving,
    steered_by,
)
from tiny_llama import TinyLlama
from transformers import LlamaConfig, LlamaForCausalLM

import actscale_fast as af
from actscale_fast.cli import main
from actscale_fast.interventions.named import add_named, remove_named

KEY = "secret"
NEW_TOKENS = 8
Case = tuple[list[int], dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return served.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def interventions(model: TinyLlama) -> dict[str, af.ActivScalar]:
    return {name: scalars(model, seed) for seed, name in enumerate(("capitals", "formal", "third one"))}


@pytest.fixture(scope="module")
def root(interventions: dict[str, af.ActivScalar], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interventions")
    for name, intervention in interventions.items():
        add_named(folder, name, intervention)
    return folder


@pytest.fixture(scope="module")
def server(model: TinyLlama, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(model.folder, root, log, "--api-key", KEY, VLLM_PLUGINS="actscale") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0)


def complete(client: openai.OpenAI, prompt: list[int], options: dict[str, Any], **more: Any) -> Any:
    extra = {"return_token_ids": True, "vllm_xargs": options} if options else {"return_token_ids": True}
    return client.completions.create(
        model="tiny", prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, logprobs=0, extra_body=extra, **more
    )


def check(
    model: TinyLlama, interventions: dict[str, af.ActivScalar], case: Case, response: Any
) -> tuple[list[int], list[float]]:
    """The tokens and their log-probabilities, once they have been compared with transformers."""
    prompt, options = case
    where = options.get("actscale_where", "all")
    return assert_right(model, prompt, steered_by(options, interventions), where, response)


PROMPT = [7 * n % 199 for n in range(40)]
GOOD = [
    {},
    {"actscale": "capitals"},
    {"actscale": "capitals", "actscale_strength": -1},
    {"actscale": "formal", "actscale_strength": 0.5, "actscale_where": "prompt"},
    {"actscale": "formal", "actscale_strength": 1.5, "actscale_where": "generated"},
    {"actscale": "third one", "actscale_where": [0, 3, -1]},
    {"actscale": "capitals+formal", "actscale_strength": [0.5, -0.25]},
    {"actscale": ["formal", "third one"], "actscale_where": "generated"},
]


@pytest.mark.parametrize("options", GOOD, ids=str)
def test_completions_are_those_of_transformers_with_plain_hooks(
    client: openai.OpenAI, model: TinyLlama, interventions: dict[str, af.ActivScalar], options: dict[str, Any]
) -> None:
    for _ in range(2):  # the second time from the prefix cache
        check(model, interventions, (PROMPT, options), complete(client, PROMPT, options))


def test_strengths_change_the_answer(client: openai.OpenAI) -> None:
    given = [{"actscale": "capitals", "actscale_strength": strength} for strength in (-1, 0, 1)]
    answers = [tuple(answer(complete(client, PROMPT, options))[1]) for options in given]
    assert len(set(answers)) == 3
    assert answers[1] == tuple(answer(complete(client, PROMPT, {}))[1]), "strength 0 changes no bit"


@pytest.mark.parametrize("options", [{}, {"actscale": "capitals", "actscale_strength": -0.7}], ids=str)
def test_chats_and_streams_give_the_same_answer(client: openai.OpenAI, options: dict[str, Any]) -> None:
    words = " ".join(f"w{token}" for token in PROMPT)
    whole = complete(client, PROMPT, options).choices[0]
    streamed = list(complete(client, PROMPT, options, stream=True))
    assert "".join(part.choices[0].text for part in streamed) == whole.text
    chat = {"model": "tiny", "messages": [{"role": "user", "content": words}], "max_tokens": NEW_TOKENS}
    extra = {"vllm_xargs": options} if options else {}
    talk = client.chat.completions.create(**chat, temperature=0, logprobs=True, extra_body=extra)
    assert talk.choices[0].message.content == whole.text
    told = [token.logprob for token in talk.choices[0].logprobs.content]
    assert_close(told, torch.tensor(whole.logprobs.token_logprobs))
    parts = client.chat.completions.create(**chat, temperature=0, stream=True, extra_body=extra)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole.text


def test_several_samples_of_one_request_are_all_steered(
    client: openai.OpenAI, model: TinyLlama, interventions: dict[str, af.ActivScalar]
) -> None:
    options = {"actscale": "capitals", "actscale_strength": 0.8}
    extra = {"return_token_ids": True, "vllm_xargs": options}
    found = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=4, temperature=1.0, seed=3, n=3, logprobs=0, extra_body=extra
    )
    for choice in found.choices:
        right = expected(model, [*PROMPT, *choice.token_ids], len(PROMPT), steered_by(options, interventions), "all")
        assert_close(choice.logprobs.token_logprobs, right.gather(1, torch.tensor(choice.token_ids)[:, None])[:, 0])


BAD = [
    ({"actscale": "capitls"}, r"actscale: got 'capitls'.*did you mean 'capitals'"),
    ({"actscale": ""}, r"actscale"),
    ({"actscale": "capitals+"}, r"actscale"),
    ({"actscale": "../capitals"}, r"actscale: got '\.\./capitals'"),
    ({"actscale": 3}, r"actscale: got 3"),
    ({"actscale": "capitals", "actscale_strength": "1"}, r"actscale_strength: got '1', expected a number"),
    ({"actscale": "capitals", "actscale_strength": 1e38}, r"actscale_strength"),
    ({"actscale": "capitals", "actscale_strength": [1, 2]}, r"actscale_strength: got 2 numbers for 1 name"),
    ({"actscale": "capitals", "actscale_strenght": 1}, r"actscale_strenght.*did you mean 'actscale_strength'"),
    ({"actscale_strength": 1}, r"actscale: missing"),
    ({"actscale": "capitals", "actscale_where": "everywhere"}, r"actscale_where: got 'everywhere'"),
    ({"actscale": "capitals", "actscale_where": [40]}, r"actscale_where.*40"),
    ({"actscale": "capitals", "actscale_where": [-41]}, r"actscale_where.*-41"),
    ({"actscale": "capitals", "actscale_where": [0, 0]}, r"actscale_where"),
    ({"actscale": "capitals", "actscale_where": [0.5]}, r"actscale_where: got 0\.5"),
    ({"actscale": "capitals", "actscale_plan": "x"}, r"actscale_plan"),
]


@pytest.mark.parametrize(("options", "reason"), BAD, ids=lambda value: str(value)[:60])
def test_bad_requests_are_refused_with_the_reason(client: openai.OpenAI, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, PROMPT, options)
    assert re.search(reason, refused.value.body["message"]), refused.value.body["message"]
    # vLLM has answered 200 by the time it looks at the parameters of a stream; the first event is the error.
    with pytest.raises(openai.APIError) as refused:
        list(complete(client, PROMPT, options, stream=True))
    assert refused.value.body["code"] == 400
    assert re.search(reason, refused.value.message), refused.value.message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + 30 * "0", "null", "{}"])
def test_numbers_that_json_does_not_have_are_refused(server: Server, client: openai.OpenAI, number: str) -> None:
    for route, body in (
        ("completions", '"prompt": "w1 w2"'),
        ("chat/completions", '"messages": [{"role": "user", "content": "w1"}]'),
    ):
        xargs = f'{{"actscale": "capitals", "actscale_strength": {number}}}'
        request = urllib.request.Request(
            f"{server.url}/v1/{route}",
            data=f'{{"model": "tiny", {body}, "max_tokens": 2, "vllm_xargs": {xargs}}}'.encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert 400 <= refused.value.code < 500
        assert json.loads(refused.value.read())["error"]["message"]
    assert complete(client, PROMPT, {}).choices[0].token_ids


def test_a_beam_search_is_refused(client: openai.OpenAI) -> None:
    extra = {"use_beam_search": True, "vllm_xargs": {"actscale": "capitals"}}
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, n=2, temperature=0, extra_body=extra)
    assert refused.value.status_code == 400
    assert "beam search" in refused.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_options_outside_of_the_extra_arguments_are_refused(client: openai.OpenAI, stream: bool) -> None:
    extra = {"actscale": "capitals", "actscale_strength": 1}
    with pytest.raises(openai.BadRequestError, match=r"actscale, actscale_strength as a field .*inside vllm_xargs"):
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, stream=stream, extra_body=extra)
    talk = [{"role": "user", "content": "w1"}]
    with pytest.raises(openai.BadRequestError, match="inside vllm_xargs"):
        client.chat.completions.create(model="tiny", messages=talk, max_tokens=2, stream=stream, extra_body=extra)


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        (
            "/v1/chat/completions",
            {"extra_body": {"vllm_xargs": {"actscale": "capitals"}}},
            "inside extra_body.vllm_xargs",
        ),
        ("/v1/messages", {"actscale": "capitals"}, "got actscale as a field .*inside vllm_xargs"),
        ("/v1/responses", {"metadata": {"actscale": "capitals"}}, "inside metadata, expected it inside vllm_xargs"),
        ("/v1/completions?actscale=capitals", {}, "in the query of the address"),
    ],
)
def test_options_that_a_route_would_drop_are_refused(
    client: openai.OpenAI, path: str, body: dict[str, Any], reason: str
) -> None:
    content = {"messages": [{"role": "user", "content": "w1"}], "prompt": "w1", "input": "w1"}
    for more in ({}, {"stream": True}):
        with pytest.raises(openai.BadRequestError, match=reason):
            client.post(
                str(client.base_url).replace("/v1/", path),
                body={"model": "tiny", "max_tokens": 2, **content, **body, **more},
                cast_to=object,
            )


def test_without_the_key_of_the_server_nothing_is_looked_at(server: Server) -> None:
    request = urllib.request.Request(
        f"{server.url}/v1/messages", data=b'{"actscale": "capitals"}', headers={"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=30)


def test_messages_and_responses_are_steered(client: openai.OpenAI) -> None:
    words = " ".join(f"w{token}" for token in PROMPT)
    said = []
    for options in ({}, {"actscale": "capitals", "actscale_strength": -0.7}):
        right = complete(client, PROMPT, options).choices[0].text
        common = {"model": "tiny", "temperature": 0, **({"vllm_xargs": options} if options else {})}
        body: dict[str, Any] = {**common, "max_tokens": NEW_TOKENS, "messages": [{"role": "user", "content": words}]}
        message: Any = client.post("/messages", body=body, cast_to=object)
        assert message["content"][0]["text"] == right
        body = {**common, "max_output_tokens": NEW_TOKENS, "input": words}
        response: Any = client.post("/responses", body=body, cast_to=object)
        assert response["output"][0]["content"][0]["text"] == right
        said.append(right)
    assert said[0] != said[1]


def test_a_route_that_drops_the_extra_arguments_refuses_them(client: openai.OpenAI) -> None:
    body = {"model": "tiny", "query": "w1", "items": ["w2"], "label_token_ids": [1, 2]}
    address = str(client.base_url).replace("/v1/", "/generative_scoring")
    client.post(address, body=body, cast_to=object)
    with pytest.raises(openai.BadRequestError, match="generative scoring cannot be steered"):
        client.post(address, body={**body, "vllm_xargs": {"actscale": "capitals"}}, cast_to=object)


def test_a_batch_of_chats_is_steered(client: openai.OpenAI) -> None:
    talk = [{"role": "user", "content": " ".join(f"w{token}" for token in PROMPT)}]
    options = {"actscale": "capitals", "actscale_strength": -0.7}
    body = {"model": "tiny", "messages": [talk, talk], "max_tokens": 8, "temperature": 0, "vllm_xargs": options}
    found = client.post("/chat/completions/batch", body=body, cast_to=object)
    right = complete(client, PROMPT, options).choices[0].text
    assert right != complete(client, PROMPT, {}).choices[0].text
    assert [choice["message"]["content"] for choice in found["choices"]] == [right, right]


def test_interventions_change_while_the_server_runs(
    client: openai.OpenAI, root: Path, model: TinyLlama, tmp_path: Path
) -> None:
    options = {"actscale": "late", "actscale_strength": 0.9}
    with pytest.raises(openai.BadRequestError):
        complete(client, PROMPT, options)
    for seed in (11, 12):  # added, then replaced
        held = {"late": scalars(model, seed)}
        add_named(root, "late", held["late"], replace=True)
        check(model, held, (PROMPT, options), complete(client, PROMPT, options))
    other = LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    foreign = af.ActivScalar.for_model(LlamaForCausalLM(other))
    for broken in (foreign, scalars(model, 13)):
        add_named(root, "late", broken, replace=True)
        if broken is not foreign:
            file = next((root / "late").glob("*.safetensors"))
            file.write_bytes(file.read_bytes()[:-4] + b"oops")
        with pytest.raises(openai.BadRequestError, match="late"):
            complete(client, PROMPT, options)
    remove_named(root, "late")
    with pytest.raises(openai.BadRequestError, match="got 'late'"):
        complete(client, PROMPT, options)


def test_a_running_request_keeps_what_it_began_with(client: openai.OpenAI, root: Path, model: TinyLlama) -> None:
    held = {"brief": scalars(model, 21)}
    add_named(root, "brief", held["brief"])
    options = {"actscale": "brief", "actscale_strength": -0.8}
    extra = {"return_token_ids": True, "vllm_xargs": options}
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=60, temperature=0, logprobs=0, stream=True, extra_body=extra
    )
    first = next(iter(stream))
    add_named(root, "brief", scalars(model, 22), replace=True)
    assert answer(complete(client, PROMPT, options))[1][:1] != first.choices[0].logprobs.token_logprobs
    remove_named(root, "brief")
    parts = [first, *stream]
    tokens = [token for part in parts for token in part.choices[0].token_ids or []]
    logprobs = [value for part in parts for value in part.choices[0].logprobs.token_logprobs]
    assert len(tokens) == 60
    right = expected(model, [*PROMPT, *tokens], len(PROMPT), steered_by(options, held), "all")
    assert tokens == right.argmax(-1).tolist()
    assert_close(logprobs, right.max(-1).values)


def test_the_table_of_the_server(
    server: Server,
    client: openai.OpenAI,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        server.get("/v1/actscale/interventions")
    monkeypatch.setenv("VLLM_API_KEY", KEY)

    def listed() -> dict[str, Any]:
        capsys.readouterr()
        assert main(["serving", "list", "--url", server.url, "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    before = listed()
    complete(client, PROMPT, {"actscale": "formal+capitals"})
    after = listed()
    rows = {row["name"]: row for row in after["interventions"]}
    assert set(rows) >= {"capitals", "formal", "third one"}
    assert rows["formal"]["kind"] == "ActivScalar"
    assert rows["formal"]["layers"] == [0, 1, 2]
    earlier = {row["name"]: row["requests"] for row in before["interventions"]}
    names = ("capitals", "formal", "third one")
    assert [rows[name]["requests"] - earlier[name] for name in names] == [1, 1, 0]
    assert after["workers"][0]["rows"] >= after["workers"][0]["rows_held"] >= 1
    assert (
        main(
            [
                "serving",
                "add",
                str(root / "formal"),
                "--name",
                "again",
                "--interventions",
                str(root),
                "--url",
                server.url,
            ]
        )
        == 0
    )
    remove_named(root, "again")


def test_metrics_count_requests_by_intervention(server: Server, client: openai.OpenAI) -> None:
    def of(figures: dict[str, float], name: str) -> float:
        return figures.get(f'actscale:steered_requests_total{{intervention="{name}"}}', 0.0)

    before = counted(server)
    for options in ({}, {"actscale": "capitals"}, {"actscale": "capitals+formal"}):
        complete(client, PROMPT, options)
    after = counted(server)
    assert of(after, "capitals") - of(before, "capitals") == 2
    assert of(after, "formal") - of(before, "formal") == 1
    assert 1 <= after["actscale:table_rows_held"] <= after["actscale:table_rows"]
    assert "vllm:num_requests_running" in server.get("/metrics")


def random_cases(n: int, seed: int = 5) -> list[Case]:
    """Requests with common beginnings of prompts, random interventions, strengths and positions."""
    rng = random.Random(seed)
    starts = [prompt_of(rng, 64) for _ in range(4)]
    cases: list[Case] = []
    for _ in range(n):
        prompt = rng.choice(starts)[: rng.choice((33, 64))] + prompt_of(rng, rng.randrange(1, 30))
        names = rng.sample(["capitals", "formal", "third one"], rng.choice((1, 1, 1, 2)))
        options: dict[str, Any] = {"actscale": "+".join(names), "actscale_strength": round(rng.uniform(-1.5, 1.5), 3)}
        where: Any = rng.choice(("all", "all", "prompt", "generated", sorted(rng.sample(range(len(prompt)), 3))))
        if where != "all":
            options["actscale_where"] = where
        cases.append((prompt, options if rng.random() < 0.8 else {}))
    return cases


def test_200_requests_at_once_each_get_the_answer_of_their_own_single_run(
    server: Server, model: TinyLlama, interventions: dict[str, af.ActivScalar]
) -> None:
    cases = random_cases(200)

    async def ask(at_once: int) -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=300) as many:
            gate = asyncio.Semaphore(at_once)

            async def one(case: Case) -> Any:
                async with gate:
                    extra = {"return_token_ids": True, **({"vllm_xargs": case[1]} if case[1] else {})}
                    return await many.completions.create(
                        model="tiny", prompt=case[0], max_tokens=NEW_TOKENS, temperature=0, logprobs=0, extra_body=extra
                    )

            return await asyncio.gather(*map(one, cases))

    together = [check(model, interventions, *pair) for pair in zip(cases, asyncio.run(ask(200)), strict=True)]
    alone = [answer(response) for response in asyncio.run(ask(1))]
    for case, got, own in zip(cases, together, alone, strict=True):
        assert got[0] == own[0], case
        assert_close(got[1], torch.tensor(own[1]))
