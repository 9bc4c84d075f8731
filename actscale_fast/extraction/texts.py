"""Texts as checked token ids, and what a model goes on to say after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import check_counts
from ..architectures.layout import ModelLayout, embedding_weight, input_device, layout, unwrap
from ..frozen.batching import Batch, left_padded, open_ids, pad_id_of
from ..modules.evaluation_mode import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Encoder:
    """Makes checked token ids of texts for one model.

    Args:
        found: the model's layout.
        tokenizer: of Hugging Face.

    Raises:
        TypeError: no tokenizer.
    """

    def __init__(self, found: ModelLayout, tokenizer: PreTrainedTokenizerBase) -> None:
        if not (callable(tokenizer) and hasattr(tokenizer, "convert_ids_to_tokens")):
            raise TypeError(f"tokenizer: got {type(tokenizer).__name__}, expected a Hugging Face tokenizer")
        embedding: Tensor = embedding_weight(found.model)
        self.tokenizer = tokenizer
        self.device = input_device(found.model)
        self.n_tokens, self.context = embedding.shape[0], found.max_context
        self.pad_id = pad_id_of(tokenizer)

    def opened(self, text: object, name: str) -> list[int]:
        """The ids of a text that goes on, with the special tokens that open it; perhaps none."""
        return self.checked(open_ids(self.tokenizer, self._string(text, name)), name)

    def plain(self, text: object, name: str) -> list[int]:
        """The ids of a text without special tokens; perhaps none."""
        return self.checked(list(self.tokenizer(self._string(text, name), add_special_tokens=False)["input_ids"]), name)

    def prompts(self, texts: Sequence[str], name: str) -> list[list[int]]:
        """The ids of prompts, each of at least one token and no longer than the context."""
        found = [self.opened(text, f"{name}: row {row}") for row, text in enumerate(check_texts(texts, name))]
        for row, ids in enumerate(found):
            if not ids:
                raise ValueError(f"{name}: row {row}: {texts[row]!r} has no tokens")
            self.fits(len(ids), f"{name}: row {row}")
        return found

    def fits(self, count: int, name: str) -> None:
        """Raise a ValueError where so many tokens are more than the model's context."""
        if self.context is not None and count > self.context:
            raise ValueError(f"{name} has {count} tokens, expected at most the model's {self.context}")

    def checked(self, ids: list[int], name: str) -> list[int]:
        """`ids` where the model has all of them."""
        if ids and max(ids) >= self.n_tokens:
            raise ValueError(
                f"{name}: token id {max(ids)}, expected less than the model's {self.n_tokens}; is the tokenizer that "
                "of another model?"
            )
        return ids

    def batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Rows of ids, padded on the left, on the model's device."""
        return left_padded(rows, self.pad_id, self.device)

    @staticmethod
    def _string(text: object, name: str) -> str:
        if not isinstance(text, str):
            raise TypeError(f"{name}: got {type(text).__name__}, expected a string")
        return text


def check_texts(texts: Any, name: str) -> Sequence[str]:
    """`texts` where it is a sequence that holds something."""
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"{name}: got {type(texts).__name__}, expected a list of strings")
    if not texts:
        raise ValueError(f"{name}: got none, expected at least one")
    return texts


def start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a text is generated from: the beginning of a sequence, or where there is none its end, or padding.

    Raises:
        ValueError: the tokenizer has none of the three.
    """
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if found is not None:
            return int(found)
    raise ValueError(
        "tokenizer: it has no token that opens or ends a text, and none for padding: nothing to start from"
    )


@torch.no_grad()
def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Batch, max_new_tokens: int
) -> list[list[int]]:
    """The ids that follow each prompt under greedy decoding with the KV cache, without the ending token.

    Whatever patches the model has are in force. The model's own generation settings (sampling, penalties) are not.
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
        # generate() fills what a given config leaves open from the model's own, which may hold penalties.
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
    """What the model says after each prompt, greedily, in batches of similar length with a KV cache.

    Inside `patch` the intervened model speaks. Special tokens are left out of the text.

    Args:
        model, tokenizer: a causal language model of Hugging Face and its tokenizer; the model is left as it was.
        prompts: N texts.
        max_new_tokens: tokens at most; a text that ends does so before.
        batch_size: prompts in one forward pass, padded on the left.
        paths: module paths of a model of an unlisted family.

    Raises:
        TypeError, ValueError: bad prompts, or a count that is not positive.
    """
    check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
    encoder = Encoder(layout(model, paths), tokenizer)
    rows = encoder.prompts(prompts, "prompts")
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    texts = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        made = greedy(model, tokenizer, encoder.batch([rows[row] for row in chosen]), max_new_tokens)
        for row, ids in zip(chosen, made, strict=True):
            texts[row] = str(tokenizer.decode(ids, skip_special_tokens=True))
    return texts
