"""A digest that tells tokenizers apart by how they write and read prompts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..learning.checkpoint import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What a tokenizer sets anew with every call, so that it says nothing about the tokenizer.
_OF_A_CALL = ("padding", "truncation")
#: Text in which tokenizers without rules in JSON show whether they add special tokens.
_SAMPLE = "The capital of Norway is Oslo."


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hexadecimal digits for the vocabulary, the rules, the special tokens and the chat template."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    added = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
    return digest(
        [
            sorted(tokenizer.get_vocab().items()), _rules(tokenizer), sorted(special.items()), added,
            tokenizer.chat_template, list(tokenizer(_SAMPLE)["input_ids"]),
        ]
    )  # fmt: skip


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Merges, normalisation and the templates of special tokens; None: the tokenizer does not tell them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules: dict[str, Any] = json.loads(backend.to_str())
    return {name: rule for name, rule in rules.items() if name not in _OF_A_CALL}
