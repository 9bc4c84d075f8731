"""A tiny random Llama with a word-level tokenizer: a whole causal model that runs in milliseconds."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

WORDS = [
    "<unk>", "<pad>", "<s>", "</s>", "The", "capital", "of", "is", "A", "B", "C", "Paris", "Berlin", "Rome", "Madrid",
    "Oslo", "Q", "what", "answer", "in", "one", "two", "three", "four", "five", "six",
]  # fmt: skip


def tokenizer() -> Any:
    """One token a word; words are split at spaces, and an unknown word is <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def llama(seed: int = 0, *, dtype: torch.dtype = torch.float32, layers: int = 3, context: int = 64) -> Any:
    """3 layers, 4 heads of 8 (2 key-value heads), random weights large enough that heads matter.

    PyTorch's generator is left as making the weights leaves it.
    """
    model, generator_state = _made(seed, dtype, layers, context)
    torch.random.set_rng_state(generator_state)
    return copy.deepcopy(model)


@functools.cache
def _made(seed: int, dtype: torch.dtype, layers: int, context: int) -> tuple[Any, torch.Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=context, initializer_range=0.3,
        bos_token_id=2, eos_token_id=3, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    return model, torch.random.get_rng_state()
