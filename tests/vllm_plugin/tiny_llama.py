"""A tiny Llama, interventions for it, and what they do to it in plain transformers: the oracle of these tests.

The oracle is a hook on the output projections with formulas of its own: for each token its own factor, shift or probe,
by its position. It runs in float64, without a cache, on a whole sequence at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import actscale_fast as af

LAYERS, HEADS, WIDTH, VOCABULARY = 3, 4, 32, 199


@dataclass
class TinyLlama:
    """The saved model, the model in float32 and a copy in float64."""

    folder: Path
    model: Any
    exact: Any

    def log_probabilities(
        self,
        tokens: Sequence[int],
        edit: Callable[[Tensor, int], Tensor] | None = None,
        output: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Tensor:
        """[T, V] for a sequence, with `edit(heads [T, H, D], layer)` at the inputs of the output projections, and
        `output(activations [T, hidden size], layer)` at what these return.
        """
        handles = []
        for number, layer in enumerate(self.exact.model.layers):

            def change(module: Any, args: tuple[Tensor, ...], number: int = number) -> tuple[Tensor, ...] | None:
                if edit is None:
                    return None
                x = args[0]  # [1, T, H·D]
                return (edit(x[0].view(-1, HEADS, WIDTH), number).reshape(x.shape),)

            def change_output(module: Any, args: Any, x: Tensor, number: int = number) -> Tensor | None:
                return None if output is None else output(x[0], number)[None]

            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(change))
            handles.append(layer.self_attn.o_proj.register_forward_hook(change_output))
        try:
            with torch.no_grad():
                logits = self.exact(torch.tensor([list(tokens)])).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits.log_softmax(-1)


def make_model(folder: Path, **changes: Any) -> TinyLlama:
    """A Llama with random weights that are large enough for interventions to change what it says."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * WIDTH,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=WIDTH,
        max_position_embeddings=1024,
        initializer_range=0.15,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        dtype="float32",
        **changes,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    exact = LlamaForCausalLM(config).eval()
    exact.load_state_dict(model.state_dict())
    return TinyLlama(folder, model, exact.double())


def make_interventions(tiny: TinyLlama, folder: Path) -> None:
    """Scalars a and b for all tokens, p with positions of its own."""
    generator = torch.Generator().manual_seed(1)
    for name in ("a", "b"):
        save(tiny, folder / name, generator)
    save(tiny, folder / "p", generator, positions=[0, -1], generated=True)


def save(
    tiny: TinyLlama, folder: Path, generator: torch.Generator, kind: str = "ActivScalar", **where: Any
) -> af.Intervention:
    """An intervention with random parameters, saved."""
    made = getattr(af, kind).for_model(tiny.model, **where)
    size = {"ActivScalar": 0.8, "SteerVec": 0.3, "DynScalar": 0.3}[kind]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(folder)
    return made
