"""Greedy decoding: what a model says after prompts, or from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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


@torch.no_grad()
def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Batch, max_new_tokens: int
) -> list[list[int]]:
    """The ids that follow each prompt under greedy decoding with the KV cache, without the token that ends them.

    Patches on the model stay active. The model's own generation settings (sampling, penalties) are ignored.
    """
    from transformers import GenerationConfig

    found: Any = unwrap(model)
    own = found.generation_config
    ends = own.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    stops = [i for i in dict.fromkeys([*listed, tokenizer.eos_token_id]) if i is not None]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops or None, pad_token_id=pad_id_of(tokenizer)
    )
    with evaluation_mode(found):
        # generate() takes settings that this config leaves open from the model's own, which may hold penalties.
        found.generation_config = GenerationConfig()
        try:
            made: Any = found.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config
            )
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
