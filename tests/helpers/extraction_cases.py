"""What the tests of the extraction recipes share: tiny models, their tokenizer, and plain loops to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny
import torch
from model_zoo import tiny_model
from torch import Tensor, nn

#: column of the sequence -> what is added there at one place; called for each column of a full forward pass.
Added = Callable[[int], Tensor | None]


def spaced_tokenizer(*, opens: bool = True) -> Any:
    """The word tokenizer of `tiny`, with " " as the token "_" and, where it `opens`, <s> before each text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*tiny.WORDS, "_"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Replace(_regex(r"^ $"), "_")
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if opens:
        inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def block_of(model: Any, layer: int) -> nn.Module:
    """A decoder layer of a tiny Llama or GPT-2, named by the test itself."""
    return model.transformer.h[layer] if model.config.model_type == "gpt2" else model.model.layers[layer]


def inputs_of_layer(model: Any, layer: int, ids: list[int]) -> Tensor:
    """What a layer is given, [T, d], by a plain hook."""
    seen: list[Tensor] = []
    hook = block_of(model, layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    hook.remove()
    return seen[0][0].clone()


def greedy_by_hand(model: Any, ids: list[int], layer: int, added: Added, n_new: int) -> list[int]:
    """Greedy decoding without cache or padding; the inputs of `layer` get `added(column)`, whatever ran before."""

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        for column in range(x.shape[1]):
            value = added(column)
            if value is not None:
                x[0, column] += value
        return (x, *args[1:])

    made = list(ids)
    for _ in range(n_new):
        hook = block_of(model, layer).register_forward_pre_hook(add)
        with torch.no_grad():
            made.append(int(model(torch.tensor([made]), use_cache=False).logits[0, -1].argmax()))
        hook.remove()
    return made[len(ids) :]


def generated(model: Any, prompts: list[list[int]], n_new: int) -> list[list[int]]:
    """generate() with the KV cache on left-padded prompts."""
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids = torch.tensor([[1] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model.generation_config = GenerationConfig()  # in which no token ends a text
    out = model.generate(ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False, pad_token_id=1)
    return out[:, width:].tolist()


def models() -> list[Any]:
    """A Llama and a GPT-2 of three layers, wide enough for the word tokenizers."""
    return [tiny_model("llama", num_hidden_layers=3), tiny_model("gpt2", n_layer=3)]
