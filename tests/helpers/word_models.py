"""A tokenizer that knows every word of the built-in tasks, one token each, and a tiny random Llama for it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from actscale_fast.tasks import CONFLICT_TEMPLATES, INDIRECT_OBJECT_TEMPLATES, indirect_objects as words
from actscale_fast.tasks.countries import CAPITALS

TEXTS = [*CONFLICT_TEMPLATES, *INDIRECT_OBJECT_TEMPLATES, *CAPITALS, *CAPITALS.values()]
TEXTS += [" ".join(part) for part in (words._NAMES, words._PLACES, words._THINGS)]


#: Without these capitals a quarter of the countries is left, and a sixteenth of the prompts that are counted.
LATE_CAPITALS = {capital for capital in CAPITALS.values() if capital > "D"}


def tokenizer(texts: Iterable[str] = TEXTS, *, without: Iterable[str] = ()) -> Any:
    """One token a word or mark; a word of `without` or outside `texts` is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Whitespace()
    found = {word for text in texts for word, _ in split.pre_tokenize_str(text)} - set(without)
    vocabulary = ["<unk>", "<pad>", "<s>", "</s>", *sorted(found)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def model_for(tokens: Any, context: int = 64) -> Any:
    """A random Llama for a tokenizer (2 layers, 4 heads of 8)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=context, initializer_range=0.3,
        bos_token_id=2, eos_token_id=3, pad_token_id=1,
    )  # fmt: skip
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    torch.random.set_rng_state(generator_state)
    return model


def save_model(folder: Path, texts: Iterable[str] = TEXTS, *, without: Iterable[str] = (), context: int = 64) -> Path:
    """Save a tokenizer that does not know the words of `without` and a random Llama (2 layers, 4 heads of 8)."""
    tokens = tokenizer(texts, without=without)
    model_for(tokens, context).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder
