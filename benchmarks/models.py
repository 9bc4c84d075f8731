"""What steps of a fit are timed on: the demo model with its task, random models of a known size with random prompts.

A random model has the shapes of its namesake and weights as its config initialises them: what a step costs is the same,
what it learns is not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import actscale_fast as af
from actscale_fast.learning.encoded_examples import EncodedExamples


@dataclass(frozen=True)
class Shape:
    """The sizes of a random model: of GPT-2's family, or of Llama's where `kv_heads` and `inner` are given."""

    layers: int
    heads: int
    head_dim: int
    vocab: int
    dtype: torch.dtype
    kv_heads: int = 0
    inner: int = 0

    def tiny(self) -> Shape:
        """The same family at a size that a CPU computes at once."""
        llama: dict[str, Any] = {"kv_heads": 2, "inner": 40} if self.kv_heads else {}
        return replace(self, layers=3, heads=4, head_dim=8, vocab=96, **llama)


GPT2_SMALL = Shape(layers=12, heads=12, head_dim=64, vocab=50257, dtype=torch.float32)
LLAMA_3_8B = Shape(
    layers=32, heads=32, head_dim=128, vocab=128256, dtype=torch.bfloat16, kv_heads=8, inner=14336
)  # fmt: skip


def random_model(shape: Shape, device: torch.device) -> Any:
    """A frozen model of this shape on the device, in evaluation mode; the same weights in each run on one device."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    width = shape.heads * shape.head_dim
    config: Any
    if shape.kv_heads:
        config = LlamaConfig(
            vocab_size=shape.vocab, hidden_size=width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
            max_position_embeddings=8192, tie_word_embeddings=False,
        )  # fmt: skip
    else:
        config = GPT2Config(
            vocab_size=shape.vocab,
            n_embd=width,
            n_layer=shape.layers,
            n_head=shape.heads,
            bos_token_id=None,
            eos_token_id=None,
        )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=shape.dtype)
    return model.eval().requires_grad_(False)


class RandomPrompts(EncodedExamples):
    """Prompts of random tokens, all of one length, with two random answers each; encoded as a fit encodes its own."""

    def __init__(self, count: int, tokens: int, vocab: int, device: torch.device) -> None:
        source = torch.Generator().manual_seed(0)
        self.examples = []
        self.device, self.pad_id = device, 0
        self.prompts = torch.randint(vocab, (count, tokens), generator=source).tolist()
        self.correct = torch.randint(vocab // 2, (count,), generator=source).to(device)
        self.wrong = self.correct + vocab // 2


@functools.cache
def demo_model() -> tuple[Any, Any]:
    """(SmolLM2-135M-Instruct, its tokenizer)."""
    return af.load_demo_model()


def conflicts(count: int, device: torch.device, *, tokens: int | None = None) -> tuple[Any, EncodedExamples]:
    """The demo model on the device and `count` country-capital conflicts, each led up to by others of them where
    `tokens` is given, so that every prompt has exactly that many tokens."""
    model, tokenizer = demo_model()
    model.to(device)
    examples: Sequence[af.Example] = af.tasks.country_capital_conflicts(tokenizer).train
    if tokens is not None:
        texts = [example.prompt for example in examples]
        examples = [
            replace(example, prompt=_led_up_to(tokenizer, example.prompt, texts, tokens))
            for example in examples[:count]
        ]
    return model, EncodedExamples(examples[:count], tokenizer, model)


def _led_up_to(tokenizer: Any, prompt: str, texts: Sequence[str], tokens: int) -> str:
    """The prompt after the end of other texts, `tokens` long in all."""
    for first in range(len(texts)):
        words = " ".join([*texts[first:], *texts[:first]][:tokens]).split()[-tokens:]
        for start in range(len(words)):
            whole = " ".join([*words[start:], prompt])
            length = len(tokenizer(whole)["input_ids"])
            if length == tokens:
                return whole
            if length < tokens:  # a word of several tokens: other texts end in other words
                break
    raise ValueError(f"tokens: got {tokens}, and no text in front of {prompt!r} makes it as long")


def named_model(source: str | None, name: str | None) -> tuple[Any, Any, str]:
    """A model in float32, its tokenizer, and its name in a benchmark's files.

    Args:
        source: a folder or a name on the hub; None: the demo's model.
        name: None: that of the demo's model, or of the folder.
    """
    if source is None:
        return *af.load_demo_model(), name or "smollm2-135m-instruct"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(source), name or Path(source).name
