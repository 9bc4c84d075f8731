"""A soak test of the vLLM plug-in: requests and changes of interventions for minutes, every answer checked.

    python -m benchmarks.vllm_soak --minutes 10

Run it in an environment with vLLM. One API server serves a tiny model; several clients send random requests (an
intervention or two, or none; strengths; positions; plain, streamed, and some cut off) while interventions are added,
replaced and removed. Each answer is compared with the single-run answer of transformers under plain hooks, with the
scalars that the name stood for when the request was sent; where a name changed in between, either answer is right.
The memory of the server's processes is read every few seconds.
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
import statistics
import sys
import tempfile
import time
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


class Soak:
    """The state of a run: what each name has stood for, and the counts.

    Args:
        url: the server.
        root: its folder of interventions.
        model: the tiny Llama.
    """

    def __init__(self, url: str, root: Path, model: Any) -> None:
        self.url, self.root, self.model = url, root, model
        self.history: dict[str, list[tuple[float, torch.Tensor | None]]] = {name: [(0.0, None)] for name in NAMES}
        self.counts = dict.fromkeys(
            ("requests", "steered", "refused", "cut off", "added or replaced", "removed", "wrong"), 0
        )
        self.worst = 0.0
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self.seed = 0
        self.starts = [prompt_of(random.Random(number), 96) for number in range(4)]

    async def change(self, end: float) -> None:
        """Add, replace and remove interventions until the end."""
        from actscale_fast.interventions.named import add_named, remove_named

        rng = random.Random(1)
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
        extra: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
        extra |= {"vllm_xargs": options} if options else {}
        common = {"model": "tiny", "prompt": prompt, "temperature": 0, "logprobs": 0, "extra_body": extra}
        self.counts["requests"] += 1
        try:
            if rng.random() < 0.1:
                stream = await client.completions.create(**common, max_tokens=60, stream=True)
                await anext(stream)
                await stream.close()
                self.counts["cut off"] += 1
                return
            found = (await client.completions.create(**common, max_tokens=NEW_TOKENS)).choices[0]
        except openai.APIError as error:  # of a stream, its first event
            possible = [self._possible(name, sent) for name in options.get("actscale", ())]
            self.counts["refused"] += 1
            code = error.body.get("code") if isinstance(error.body, dict) else None
            if code != 400 or not any(value is None for values in possible for value in values):
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

    def _report(self, what: str, options: dict[str, Any]) -> None:
        self.counts["wrong"] += 1
        self.wrong.append(f"{what}; {options}")
        print(self.wrong[-1], file=sys.stderr, flush=True)


async def run(soak: Soak, minutes: float, server: int) -> list[tuple[float, float]]:
    """All clients, the changes, and the memory of the server's processes: (seconds, MiB)."""
    import openai

    start = time.monotonic()
    end = start + 60 * minutes
    memory: list[tuple[float, float]] = []

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append((time.monotonic() - start, _memory(server)))
            await asyncio.sleep(5)

    async with openai.AsyncOpenAI(base_url=soak.url + "/v1", api_key="none", max_retries=0, timeout=120) as client:
        asking = [soak.ask(client, random.Random(100 + number), end) for number in range(CLIENTS)]
        await asyncio.gather(soak.change(end), watch(), *asking)
    return memory


def _memory(server: int) -> float:
    """MiB that the processes of the server have for themselves (USS)."""
    top, total = psutil.Process(server), 0
    for process in (top, *top.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().uss
    return total / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=FOLDER / "vllm" / "soak.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = served.save_model(folder / "model")
        (folder / "interventions").mkdir()
        os.environ["VLLM_PLUGINS"] = "actscale"
        with served.serving(folder / "model", folder / "interventions", folder / "server.log") as server:
            soak = Soak(server.url, folder / "interventions", model)
            memory = asyncio.run(run(soak, options.minutes, server.process.pid))
            metrics = [line for line in server.get("/metrics").splitlines() if line.startswith("actscale:table")]
    record = {
        "case": "vllm_soak", "minutes": options.minutes, "environment": environment(torch.device("cpu")),
        "counts": soak.counts, "worst_difference": float(f"{soak.worst:.2g}"), "tolerance": TOLERANCE,
        "median_seconds": round(statistics.median(soak.seconds), 3), "clients": CLIENTS, "wrong": soak.wrong[:20],
        "memory_mib": _summary(memory), "metrics": metrics,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))
    sys.exit(bool(soak.wrong))


def _summary(memory: list[tuple[float, float]]) -> dict[str, Any]:
    """Memory by tenths of the run (medians), and its slope over the second half in MiB per minute."""
    tenths = [statistics.median(value for _, value in part) for part in _parts(memory, 10)]
    late = memory[len(memory) // 2 :]
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope * 60 if len(late) > 1 else 0.0
    return {"by_tenths": [round(value, 1) for value in tenths], "slope_of_second_half_per_minute": round(slope, 2)}


def _parts(values: list[Any], n: int) -> list[list[Any]]:
    bounds = [len(values) * index // n for index in range(n + 1)]
    return [values[a:b] for a, b in itertools.pairwise(bounds) if a < b]


if __name__ == "__main__":
    main()
