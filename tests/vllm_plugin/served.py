"""A tiny model, interventions for it, a vLLM server in a process of its own, and what its answers must be."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_llama import HEADS, VOCABULARY, TinyLlama, make_model
from torch import Tensor

import actscale_fast as af

#: vLLM's options for a model this small on a CPU.
OPTIONS = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "32", "--block-size", "32")
#: Log-probabilities of float32 on a CPU: the order of sums differs with the batch and between vLLM and transformers.
TOLERANCE = 1e-4
_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
_PATIENCE = 240.0  # seconds for a start: 20 on a quiet machine


def save_model(folder: Path) -> TinyLlama:
    """Save the tiny Llama with a tokenizer that has a word for each token: w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = make_model(folder)
    inner = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    return made


def scalars(tiny: TinyLlama, seed: int, scale: float = 0.6) -> af.ActivScalar:
    """Random scalars on all heads."""
    made = af.ActivScalar.for_model(tiny.model)
    with torch.no_grad():
        made.alpha.normal_(std=scale, generator=torch.Generator().manual_seed(seed))
    return made


def expected(
    tiny: TinyLlama, tokens: Sequence[int], n_prompt: int, steering: Sequence[tuple[Tensor, float]], where: Any
) -> Tensor:
    """Log-probabilities [T - n_prompt, V] of the tokens after a prompt, in transformers under plain hooks.

    Args:
        tiny: the model.
        tokens: the prompt's and the generated ones.
        n_prompt: how many are the prompt's.
        steering: (alpha [L, H], strength) of each intervention, in order.
        where: "all", "prompt", "generated", or positions in the prompt.
    """
    position = torch.arange(len(tokens))
    if isinstance(where, str):
        chosen = {"all": position >= 0, "prompt": position < n_prompt, "generated": position >= n_prompt}[where]
    else:
        chosen = torch.zeros(len(tokens), dtype=torch.bool)
        chosen[[at + n_prompt if at < 0 else at for at in where]] = True

    def edit(heads: Tensor, layer: int) -> Tensor:
        factor = torch.ones(HEADS, dtype=heads.dtype)
        for alpha, strength in steering:
            factor = factor * (1 + strength * alpha[layer])
        return heads * torch.where(chosen[:, None], factor, 1.0)[:, :, None]

    return tiny.log_probabilities(tokens, edit)[n_prompt - 1 : -1]


def steered_by(options: dict[str, Any], interventions: dict[str, Any]) -> list[tuple[Tensor, float]]:
    """(alpha [L, H], strength) of each intervention that the options of a request name."""
    if not options:
        return []
    names = options["actscale"] if isinstance(options["actscale"], list) else options["actscale"].split("+")
    strength = options.get("actscale_strength", 1.0)
    strengths = strength if isinstance(strength, list) else [strength] * len(names)
    return [(interventions[name].alpha.detach()[:, 0], beta) for name, beta in zip(names, strengths, strict=True)]


def answer(response: Any) -> tuple[list[int], list[float]]:
    """The tokens of a completion and their log-probabilities."""
    choice = response.choices[0]
    return choice.token_ids, choice.logprobs.token_logprobs


def assert_close(logprobs: Sequence[float], right: Tensor) -> None:
    """Log-probabilities within the tolerance."""
    torch.testing.assert_close(torch.tensor(logprobs), right, atol=TOLERANCE, rtol=0, check_dtype=False)


def assert_right(
    tiny: TinyLlama, prompt: Sequence[int], steering: Sequence[tuple[Tensor, float]], where: Any, response: Any
) -> tuple[list[int], list[float]]:
    """The tokens are the most likely ones, with the log-probabilities of transformers under plain hooks."""
    tokens, logprobs = answer(response)
    right = expected(tiny, [*prompt, *tokens], len(prompt), steering, where)
    assert tokens == right.argmax(-1).tolist(), (steering, where)
    assert_close(logprobs, right.max(-1).values)
    return tokens, logprobs


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> str:
        """The body of a page."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return str(answer.read().decode())


@contextlib.contextmanager
def serving(model: Path, interventions: Path | None, log: Path, *options: str, **environment: str) -> Iterator[Server]:
    """Run vLLM's API server until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name"]
    words += ["tiny", "--host", "127.0.0.1", "--port", str(port), *OPTIONS, *options]
    values = os.environ | {
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        **({} if interventions is None else {"ACTSCALE_INTERVENTIONS": str(interventions)}), **environment,
    }  # fmt: skip
    with log.open("wb") as file:
        # A session of its own, so that all of its processes can be ended together.
        process = subprocess.Popen(words, env=values, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait(server)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(server: Server) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            server.get("/health")
            return
        time.sleep(0.3)
    last = "\n".join(server.log.read_text(errors="replace").splitlines()[-30:])
    raise RuntimeError(f"the server did not start (exit status {server.process.poll()}):\n{last}")


def prompt_of(rng: random.Random, n_words: int) -> list[int]:
    """A prompt of random words, as tokens."""
    return [rng.randrange(VOCABULARY) for _ in range(n_words)]


def counted(server: Server) -> dict[str, float]:
    """The plug-in's figures on vLLM's page of metrics."""
    lines = [line.rpartition(" ") for line in server.get("/metrics").splitlines() if line.startswith("actscale:")]
    return {name: float(value) for name, _, value in lines if "_created" not in name}
