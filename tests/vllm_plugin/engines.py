"""Engines of vLLM in the test's process, requests to them, and the comparison of what they say with the oracle."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_llama import TinyLlama
from torch import Tensor

from actscale_fast.integrations.vllm import plugin
from actscale_fast.integrations.vllm.settings import FOLDER

#: Log-probabilities of a float32 engine differ from float64 by rounding: about 1e-5 for this model, whose logits reach
#: 10, while the weakest intervention of these tests changes them by more than 1e-1.
TOLERANCE = 1e-4
#: The blocks of vLLM's attention on a CPU.
BLOCK = 32


@contextlib.contextmanager
def serving(tiny: TinyLlama | Path, folder: Path | None, **options: Any) -> Iterator[Any]:
    """An LLM of vLLM with the interventions of a folder; None: without the plug-in."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    before = os.environ.pop(FOLDER, None)
    if folder is not None:
        os.environ[FOLDER] = str(folder)
        plugin.register()  # vLLM calls it only for the first engine of a process
    settings: dict[str, Any] = {
        "enforce_eager": True, "dtype": "float32", "max_model_len": 256, "max_num_seqs": 32, "block_size": BLOCK,
        "skip_tokenizer_init": True, "disable_log_stats": False, **options,
    }  # fmt: skip
    llm = None
    try:
        llm = LLM(model=str(tiny.folder if isinstance(tiny, TinyLlama) else tiny), **settings)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        os.environ.pop(FOLDER, None)
        if before is not None:
            os.environ[FOLDER] = before
        gc.collect()
        cleanup_dist_env_and_memory()


def params(n_tokens: int = 8, **extra: Any) -> Any:
    """Greedy sampling with the log-probability of each token."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=n_tokens, logprobs=1, detokenize=False, ignore_eos=True, extra_args=extra or None
    )


def ask(llm: Any, requests: Sequence[tuple[Sequence[int], Any]]) -> list[Any]:
    """The results of prompts with their parameters, in their order."""
    prompts = [{"prompt_token_ids": list(prompt)} for prompt, _ in requests]
    return llm.generate(prompts, [one for _, one in requests], use_tqdm=False)  # type: ignore[no-any-return]


def said(result: Any) -> list[int]:
    return list(result.outputs[0].token_ids)


def log_probabilities(result: Any) -> Tensor:
    """float64 [n], of the tokens that a request generated."""
    output = result.outputs[0]
    return torch.tensor(
        [chosen[token].logprob for token, chosen in zip(output.token_ids, output.logprobs, strict=True)]
    ).double()


Edit = Callable[[Tensor, int], Tensor]


def require_equal(
    tiny: TinyLlama, prompt: Sequence[int], result: Any, edit: Edit | None, output: Edit | None = None
) -> None:
    """The generated tokens are the likeliest ones of the oracle, with its log-probabilities."""
    tokens = said(result)
    exact = tiny.log_probabilities([*prompt, *tokens], edit, output)[len(prompt) - 1 : -1]
    chosen = exact[torch.arange(len(tokens)), torch.tensor(tokens)]
    assert (exact.max(-1).values - chosen).max() <= TOLERANCE, "another token is likelier"
    assert (log_probabilities(result) - chosen).abs().max() <= TOLERANCE


def effect(tiny: TinyLlama, prompt: Sequence[int], result: Any, edit: Edit | None, output: Edit | None = None) -> float:
    """How much an edit changes the log-probabilities of the generated tokens."""
    tokens = [*prompt, *said(result)]
    with_edit, without = tiny.log_probabilities(tokens, edit, output), tiny.log_probabilities(tokens)
    return float((with_edit - without)[len(prompt) - 1 : -1].abs().max())


def scaling(alpha: Tensor, beta: float, tokens: Callable[[Tensor], Tensor] | None = None) -> Edit:
    """h·(1 + β·α) for the tokens at the positions that `tokens(positions)` marks; alpha [L, H]."""

    def edit(heads: Tensor, layer: int) -> Tensor:
        steered = h = heads * (1 + beta * alpha[layer].double())[None, :, None]
        if tokens is None:
            return h
        marked = tokens(torch.arange(len(heads)))
        return torch.where(marked[:, None, None], steered, heads)

    return edit


def adding(vectors: Tensor, beta: float, tokens: Callable[[Tensor], Tensor] | None = None) -> Edit:
    """x + β·v for the tokens at the positions that `tokens(positions)` marks; vectors [L, hidden size]."""

    def edit(x: Tensor, layer: int) -> Tensor:
        marked = torch.ones(len(x), dtype=torch.bool) if tokens is None else tokens(torch.arange(len(x)))
        return x + marked[:, None] * beta * vectors[layer].double()

    return edit
