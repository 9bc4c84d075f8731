"""Two tensor-parallel ranks behind two API server processes, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import served
from served import Server, serving, steered_by
from tiny_llama import TinyLlama

import actscale_fast as af
from actscale_fast.interventions.named import add_named

PROMPT = [11 * n % 199 for n in range(37)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"actscale": "a"},
    {"actscale": "a", "actscale_strength": -1.0, "actscale_where": "prompt"},
    {"actscale": "a+b", "actscale_strength": [0.5, 0.8], "actscale_where": "generated"},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return served.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def root(tiny: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interventions")
    for seed, name in enumerate("ab"):
        add_named(folder, name, served.scalars(tiny, seed))
    return folder


@pytest.fixture(scope="module")
def server(tiny: TinyLlama, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    options = ("--tensor-parallel-size", "2", "--api-server-count", "2", "--enforce-eager")
    with serving(tiny.folder, root, log, *options, VLLM_PLUGINS="actscale") as running:
        yield running


def ask(server: Server, many: list[dict[str, Any]]) -> list[Any]:
    """The answers to one prompt, each over a connection of its own, so that both processes take part."""

    async def one(options: dict[str, Any]) -> Any:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            extra = {"return_token_ids": True, **({"vllm_xargs": options} if options else {})}
            return await client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=0, extra_body=extra
            )

    async def run() -> list[Any]:
        return await asyncio.gather(*map(one, many))

    return asyncio.run(run())


def test_each_rank_scales_its_own_heads(server: Server, tiny: TinyLlama, root: Path) -> None:
    held = {name: af.load_intervention(root / name) for name in "ab"}
    for options, found in zip(OPTIONS * 3, ask(server, OPTIONS * 3), strict=True):
        served.assert_right(tiny, PROMPT, steered_by(options, held), options.get("actscale_where", "all"), found)


def test_every_process_sees_a_replacement(server: Server, tiny: TinyLlama, root: Path) -> None:
    for seed in (31, 32):
        held = {"late": served.scalars(tiny, seed)}
        add_named(root, "late", held["late"], replace=True)
        for found in ask(server, [{"actscale": "late"}] * 12):
            served.assert_right(tiny, PROMPT, steered_by({"actscale": "late"}, held), "all", found)


def test_metrics_add_up_over_the_processes(server: Server) -> None:
    before = served.counted(server)
    ask(server, [{"actscale": "b", "actscale_strength": 0.1 * number} for number in range(1, 13)])
    after = served.counted(server)
    name = 'actscale:steered_requests_total{intervention="b"}'
    assert after[name] - before.get(name, 0.0) == 12
    assert 1 <= after["actscale:table_rows_held"] <= after["actscale:table_rows"]
