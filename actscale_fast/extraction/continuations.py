"""Decoding: what a model says after prompts, or from nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .._checks import check_counts
from ..architectures.hugging_face import unwrap
from ..architectures.layout import layout
from ..frozen.batching import Batch, pad_id_of
from ..frozen.encoder import TextEncoder, by_length
from ..modules.evaluation_mode import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a text is generated from: the tokenizer's BOS, else its EOS, else its padding token.

    Raises:
        ValueError: the tokenizer has none of the three.
    """
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if found is not None:
            return int(found)
    raise ValueError("tokenizer: it has no BOS, EOS or padding token to start from")


class Sampling(NamedTuple):
    """How tokens are drawn: from p^(1/temperature), among the most likely ones that together have probability top_p."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Batch, max_new_tokens: int
) -> list[list[int]]:
    """The ids that follow each prompt under greedy decoding with the KV cache, without the token that ends them.

    Patches on the model are in force. The model's own generation settings (sampling, penalties) are ignored.
    """
    return generated(model, tokenizer, batch, max_new_tokens)


@torch.no_grad()
def generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    streamer: Any = None,
) -> list[list[int]]:
    """`greedy`, or with tokens drawn at random; the process's random numbers are left as they were.

    Args:
        sampling: how tokens are drawn; None: the most likely one.
        streamer: a `transformers.TextStreamer`, which takes the tokens of a batch of one while they are made.
    """
    from transformers import GenerationConfig

    found: Any = unwrap(model)
    own = found.generation_config
    ends = own.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    stops = [i for i in dict.fromkeys([*listed, tokenizer.eos_token_id]) if i is not None]
    how: dict[str, Any] = {"do_sample": False}
    if sampling is not None:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=stops or None, pad_token_id=pad_id_of(tokenizer), **how
    )
    device = batch.input_ids.device
    with evaluation_mode(found), contextlib.ExitStack() as stack:
        if sampling is not None:
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            torch.manual_seed(sampling.seed)
        # generate() takes settings that this config leaves open from the model's own, which may hold penalties.
        found.generation_config = GenerationConfig()
        try:
            made: Any = found.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config,
                streamer=streamer,
            )  # fmt: skip
        finally:
            found.generation_config = own
    rows = made[:, batch.input_ids.shape[1] :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    paths: dict[str, str] | None = None,
) -> list[str]:
    """The greedy continuation of each prompt, without special tokens.

    Inside `patch` the intervened model generates.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer; the model is left unchanged.
        prompts: N texts.
        max_new_tokens: maximum number of tokens in each continuation.
        batch_size: prompts per forward pass, sorted by length and padded on the left.
        paths: module paths for a model whose structure is not recognised.

    Raises:
        TypeError, ValueError: an invalid prompt, or a count that is not positive.
    """
    check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
    encoder = TextEncoder(layout(model, paths), tokenizer)
    rows = encoder.prompts(prompts, "prompts")
    texts = [""] * len(rows)
    for chosen in by_length(rows, batch_size):
        made = greedy(model, tokenizer, encoder.batch([rows[row] for row in chosen]), max_new_tokens)
        for row, ids in zip(chosen, made, strict=True):
            texts[row] = str(tokenizer.decode(ids, skip_special_tokens=True))
    return texts
