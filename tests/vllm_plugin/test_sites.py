"""Which attention layers are steered: those whose output enters the projection, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import TOLERANCE, ask, log_probabilities, params, said, serving
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast.integrations.vllm.sites import _not_before_projection

HEADS, WIDTH, HIDDEN = 4, 32, 128


class FakeAttention(nn.Module):
    num_heads, head_size = HEADS, WIDTH

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("the check must not need the attention itself")


class FakeLinear(nn.Linear):
    quant_method = None  # what vLLM's linear layers have

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class Block(nn.Module):
    """An attention block; `between` stands between the attention and the projection."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj = FakeLinear(HIDDEN, 3 * HIDDEN), FakeLinear(HIDDEN, HIDDEN)
        self.attn, self.between = FakeAttention(), between

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(hidden_states)[0].chunk(3, -1)
        return self.o_proj(self.between(self.attn(q, k, v)))[0]  # type: ignore[no-any-return]


class NeedsMore(Block):
    def forward(self, positions: Tensor, hidden_states: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        raise AssertionError


class Unprojected(Block):
    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        return self.attn(hidden_states, hidden_states, hidden_states)  # type: ignore[no-any-return]


def reason_for(block: Block) -> str | None:
    modules = dict(block.named_modules())
    found = _not_before_projection(modules, "attn", block.attn, HIDDEN, torch.float32)
    assert "forward" not in vars(block.attn)
    assert not any(module._forward_pre_hooks for module in modules.values())
    return found


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (Block(lambda x: x), None),
        (Block(lambda x: x.view(2, HEADS, WIDTH).reshape(2, -1)), None),
        (Block(nn.RMSNorm(HIDDEN)), "a norm, a gate or another operation"),
        (Block(lambda x: x * torch.sigmoid(x)), "a norm, a gate or another operation"),
        (Block(lambda x: x.view(2, HEADS, WIDTH).flip(1).reshape(2, -1)), "a norm, a gate or another operation"),
        (NeedsMore(lambda x: x), "takes 'mask', so that the check of its heads cannot run it"),
        (Unprojected(lambda x: x), "no projection of Unprojected gets"),
        (Block(lambda x: x.view(3, -1)), "the short run that verifies Block failed: RuntimeError"),
    ],
)
def test_the_check_sees_what_stands_before_the_projection(block: Block, expected: str | None) -> None:
    found = reason_for(block)
    assert (found is None) if expected is None else (expected in (found or ""))


def family(name: str) -> Any:
    """A tiny model of transformers with random weights."""
    import transformers as hf

    sizes = {"vocab_size": 97, "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None,
             "pad_token_id": None, "dtype": "float32"}  # fmt: skip
    layers = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 64}
    torch.manual_seed(0)
    if name == "gpt2":
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=HEADS, n_positions=256, **sizes)
        ).eval()
    wide = {**sizes, **layers, "num_key_value_heads": 2, "head_dim": WIDTH, "max_position_embeddings": 256}
    if name == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(**wide)).eval()
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(query_pre_attn_scalar=WIDTH, **wide)).eval()


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2"])
def test_other_families_equal_a_patch_in_transformers(name: str, tmp_path: Path) -> None:
    model, prompt = family(name), list(range(1, 20))
    model.save_pretrained(tmp_path / "model")
    scalars = af.ActivScalar.for_model(model)
    with torch.no_grad():
        scalars.alpha.copy_(0.8 * torch.randn(scalars.alpha.shape, generator=torch.Generator().manual_seed(1)))
    scalars.save_pretrained(tmp_path / "interventions" / "a")
    with serving(tmp_path / "model", tmp_path / "interventions") as llm:
        results = ask(llm, [(prompt, params()), (prompt, params(actscale="a", actscale_strength=-0.5))])
    errors, effects = [], []
    for result, strength in zip(results, (0.0, -0.5), strict=True):
        tokens = said(result)
        with torch.no_grad():
            plain = model(torch.tensor([[*prompt, *tokens]])).logits[0].double().log_softmax(-1)
            with af.patch(model, scalars, strength=strength):
                logits = model(torch.tensor([[*prompt, *tokens]])).logits[0].double().log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(tokens)), torch.tensor(tokens)
        errors.append(float((log_probabilities(result) - logits[at]).abs().max()))
        effects.append(float((plain - logits)[at].abs().max()))
    # Without an intervention vLLM differs from transformers by up to 4e-4: in Gemma 2, another tanh.
    assert errors[0] <= 10 * TOLERANCE
    assert errors[1] <= max(TOLERANCE, 3 * errors[0])
    assert effects[0] == 0
    assert effects[1] > 20 * max(errors)
