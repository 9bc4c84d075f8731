"""A soak test of the vLLM plug-in: requests and changes of interventions for minutes, every answer checked.

    python -m benchmarks.vllm_soak --minutes 10 --control

Run it in an environment with vLLM. One API server serves a tiny model; several clients send random requests (an
intervention or two, or none; strengths; positions; plain, streamed, and some cut off) while interventions are added,
replaced and removed. Each answer is compared with the single-run answer of transformers under plain hooks, with the
scalars that the name stood for when the request was sent; where a name changed in between, either answer is right.

`--control` runs a second server beside it, at the same time and with the same requests, but without the plug-in: they
name no intervention, and those that the plug-in refuses ask for a negative number of tokens, which vLLM refuses.

The memory of each process of the servers is read every few seconds; the slope is that after a warm-up. On a CPU, oneDNN
keeps a compiled matrix product for each number of tokens that a forward pass has had, 1024 of them by default, so the
memory of vLLM's worker rises until each number has occurred, with or without the plug-in. These are not kept here
(`--onednn-cache 0`), so that a leak would be seen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from .machine import ROOT, environment
from .results import FOLDER

sys.path.append(str(ROOT / "tests" / "vllm_plugin"))

import served
from served import expected, prompt_of, scalars

TOLERANCE = 1e-4
NEW_TOKENS = 8
NAMES = [f"n{number}" for number in range(12)]
CLIENTS = 8
#: The share of the run before the slope of the memory is computed.
WARM_UP = 0.3
#: Blocks of 32 tokens: few, so that they are used again and again; all clients' requests hold at most 48 at once.
BLOCKS = 256


class Soak:
    """The state of a run: what each name has stood for, and the counts.

    Args:
        url: the server.
        root: the folder of interventions.
        model: the tiny Llama.
        steered: whether requests name interventions; False: the server has no plug-in.
    """

    def __init__(self, url: str, root: Path, model: Any, *, steered: bool = True) -> None:
        self.url, self.root, self.model, self.steered = url, root, model, steered
        self.history: dict[str, list[tuple[float, torch.Tensor | None]]] = {name: [(0.0, None)] for name in NAMES}
        self.counts = dict.fromkeys(
            ("requests", "steered", "refused", "cut off", "added or replaced", "removed", "wrong"), 0
        )
        self.worst = 0.0
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self.seed = 0
        self.starts = [prompt_of(random.Random(number), 96) for number in range(4)]

    async def change(self, end: float, *, for_seconds: float | None = None) -> None:
        """Add, replace and remove interventions until the end, or for so many seconds."""
        from actscale_fast.interventions.named import add_named, remove_named

        rng = random.Random(1)
        end = end if for_seconds is None else time.monotonic() + for_seconds
        while time.monotonic() < end:
            name = rng.choice(NAMES)
            now = self.history[name][-1][1]
            if now is not None and rng.random() < 0.4:
                self.history[name].append((time.monotonic(), None))
                remove_named(self.root, name)
                self.counts["removed"] += 1
            else:
                self.seed += 1
                made = scalars(self.model, self.seed)
                self.history[name].append((time.monotonic(), made.alpha.detach()[:, 0]))
                add_named(self.root, name, made, replace=True)
                self.counts["added or replaced"] += 1
            # Until here, a request may have seen either.
            self.history[name].append((time.monotonic(), self.history[name][-1][1]))
            await asyncio.sleep(rng.uniform(0.05, 0.4))

    async def ask(self, client: Any, rng: random.Random, end: float) -> None:
        """Send requests one after the other until the end."""
        while time.monotonic() < end:
            prompt = rng.choice(self.starts)[: rng.choice((40, 96))] + [
                4 + rng.randrange(60) for _ in range(rng.randrange(1, 12))
            ]
            names = [] if rng.random() < 0.2 else rng.sample(NAMES, rng.choice((1, 1, 2)))
            strengths = [round(rng.uniform(-1.5, 1.5), 3) for _ in names]
            where = rng.choice(("all", "prompt", "generated", [0, 5, -1]))
            options = {"actscale": names, "actscale_strength": strengths, "actscale_where": where} if names else {}
            await self._one(client, rng, prompt, options)

    async def _one(self, client: Any, rng: random.Random, prompt: list[int], options: dict[str, Any]) -> None:
        import openai

        sent = time.monotonic()
        bad = not self.steered and any(self.history[name][-1][1] is None for name in options.get("actscale", ()))
        options = options if self.steered else {}
        extra: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
        extra |= {"vllm_xargs": options} if options else {}
        common = {"model": "tiny", "prompt": prompt, "temperature": 0, "logprobs": 0, "extra_body": extra}
        self.counts["requests"] += 1
        try:
            if rng.random() < 0.1:
                stream = await client.completions.create(**common, max_tokens=-1 if bad else 60, stream=True)
                await anext(stream)
                await stream.close()
                self.counts["cut off"] += 1
                return
            found = (await client.completions.create(**common, max_tokens=-1 if bad else NEW_TOKENS)).choices[0]
        except openai.APIError as error:  # of a stream, its first event
            possible = [self._possible(name, sent) for name in options.get("actscale", ())]
            self.counts["refused"] += 1
            code = error.body.get("code") if isinstance(error.body, dict) else None
            if code != 400 or not (bad or any(value is None for values in possible for value in values)):
                self._report(f"refused: {error!r}", options)
            return
        self.seconds.append(time.monotonic() - sent)
        possible = [self._possible(name, sent) for name in options.get("actscale", ())]
        self.counts["steered"] += bool(options)
        distance = self._distance(prompt, options, possible, found.token_ids, found.logprobs.token_logprobs)
        if math.isnan(distance) or distance > TOLERANCE:
            self._report(f"log-probabilities differ by {distance:.2g}", options)
        else:
            self.worst = max(self.worst, distance)

    def _possible(self, name: str, since: float) -> list[torch.Tensor | None]:
        """What a name may have stood for from then until now."""
        entries = self.history[name]
        first = max(index for index, (when, _) in enumerate(entries) if when <= since)
        # The entry before: it was being changed when the request was sent.
        return [value for _, value in entries[max(first - 1, 0) :]]

    def _distance(
        self, prompt: list[int], options: dict[str, Any], possible: list[list[torch.Tensor | None]],
        tokens: list[int], logprobs: list[float],
    ) -> float:  # fmt: skip
        """The distance to the nearest answer that is right."""
        choices: list[list[torch.Tensor]] = [[]]
        for values in possible:
            choices = [[*begun, value] for begun in choices for value in values if value is not None]
        distances = []
        for alphas in choices:
            steering = list(zip(alphas, options.get("actscale_strength", ()), strict=True))
            where = options.get("actscale_where", "all")
            right = expected(self.model, [*prompt, *tokens], len(prompt), steering, where)
            own = right.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            most_likely = (right.max(-1).values - own).max()  # 0 for greedy tokens
            distances.append(float(torch.maximum((own - torch.tensor(logprobs)).abs().max(), most_likely)))
        return min(distances, default=float("inf"))

    def summary(self) -> dict[str, Any]:
        """The counts, the largest error and the median time of an answer."""
        return {
            "counts": self.counts,
            "worst_difference": float(f"{self.worst:.2g}"),
            "median_seconds": round(statistics.median(self.seconds), 3),
            "wrong": self.wrong[:20],
        }

    def _report(self, what: str, options: dict[str, Any]) -> None:
        self.counts["wrong"] += 1
        self.wrong.append(f"{what}; {options}")
        print(self.wrong[-1], file=sys.stderr, flush=True)


class Memory:
    """The memory of each process of a server, read every few seconds.

    Args:
        server: the process that was started.
        soak: the requests to it.
    """

    def __init__(self, server: int, soak: Soak) -> None:
        self.server, self.soak = server, soak
        self.requests: list[int] = []
        self.seconds: list[float] = []
        self.mib: dict[str, list[float]] = {}

    async def watch(self, end: float) -> None:
        """Read it until the end."""
        start = time.monotonic()
        while time.monotonic() < end:
            self.seconds.append(time.monotonic() - start)
            self.requests.append(self.soak.counts["requests"])
            for role, mib in _memory(self.server).items():
                self.mib.setdefault(role, []).append(mib)
            await asyncio.sleep(5)

    def summary(self) -> dict[str, Any]:
        """For each process its memory in MiB by tenths of the run (medians), and what it gained after the warm-up."""
        return {role: self._of(values) for role, values in self.mib.items() if len(values) == len(self.seconds)}

    def _of(self, mib: list[float]) -> dict[str, Any]:
        warm = next(index for index, at in enumerate(self.seconds) if at >= WARM_UP * self.seconds[-1])

        def slope(over: Sequence[float]) -> float:
            return statistics.linear_regression(over[warm:], mib[warm:]).slope

        return {
            "by_tenths": [round(statistics.median(part), 1) for part in _parts(mib, 10)],
            "slope_per_minute": round(60 * slope(self.seconds), 2),
            "slope_per_1000_requests": round(1000 * slope(self.requests), 2),
        }


def _memory(server: int) -> dict[str, float]:
    """MiB that each process of the server has for itself (USS), by what it does."""
    top = psutil.Process(server)
    found: dict[str, float] = {}
    for process in (top, *top.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            named = re.search(r"VLLM::([A-Za-z]+)", " ".join(process.cmdline()))  # the title that vLLM gives it
            role = "API server" if process == top else named[1] if named else "other"
            found[role] = found.get(role, 0.0) + process.memory_full_info().uss / 2**20
    return found


async def run(soaks: Sequence[Soak], memories: Sequence[Memory], minutes: float, *, changes: bool) -> None:
    """All clients of all servers, and the changes."""
    import openai

    end = time.monotonic() + 60 * minutes
    async with contextlib.AsyncExitStack() as stack:
        tasks = [memory.watch(end) for memory in memories]
        for soak in soaks:
            client = await stack.enter_async_context(
                openai.AsyncOpenAI(base_url=soak.url + "/v1", api_key="none", max_retries=0, timeout=120)
            )
            tasks += [soak.ask(client, random.Random(100 + number), end) for number in range(CLIENTS)]
            tasks += [soak.change(end, for_seconds=None if changes else 10.0)]
        await asyncio.gather(*tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--control", action="store_true", help="a server without the plug-in beside it")
    parser.add_argument("--no-changes", action="store_true", help="change interventions in the first ten seconds only")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="blocks of the key-value cache; 0: vLLM's choice")
    parser.add_argument("--onednn-cache", type=int, default=0, help="products that oneDNN keeps; its own default: 1024")
    parser.add_argument("--out", type=Path, default=FOLDER / "vllm" / "soak.json")
    options = parser.parse_args()
    os.environ |= {"VLLM_PLUGINS": "actscale", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(options.onednn_cache)}
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        folder = Path(made)
        model = served.save_model(folder / "model")
        pool = ("--num-gpu-blocks-override", str(options.blocks)) if options.blocks else ()
        soaks: dict[str, Soak] = {}
        memories: dict[str, Memory] = {}
        for name in ("plug-in", "control") if options.control else ("plug-in",):
            root = folder / f"interventions of the {name}"
            root.mkdir()
            own = root if name == "plug-in" else None
            server = stack.enter_context(served.serving(folder / "model", own, folder / f"{name}.log", *pool))
            soaks[name] = Soak(server.url, root, model, steered=own is not None)
            memories[name] = Memory(server.process.pid, soaks[name])
            if own is not None:
                plugged = server
        asyncio.run(run([*soaks.values()], [*memories.values()], options.minutes, changes=not options.no_changes))
        metrics = [line for line in plugged.get("/metrics").splitlines() if line.startswith("actscale:table")]
    record = {
        "case": "vllm_soak", "minutes": options.minutes, "environment": environment(torch.device("cpu")),
        "tolerance": TOLERANCE, "clients": CLIENTS, "blocks": options.blocks, "warm_up": WARM_UP,
        "onednn_cache": options.onednn_cache,
        **{name: {**soak.summary(), "memory_mib": memories[name].summary()} for name, soak in soaks.items()},
        "metrics": metrics,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))
    sys.exit(any(soak.wrong for soak in soaks.values()))


def _parts(values: list[Any], n: int) -> list[list[Any]]:
    bounds = [len(values) * index // n for index in range(n + 1)]
    return [values[a:b] for a, b in itertools.pairwise(bounds) if a < b]


if __name__ == "__main__":
    main()
