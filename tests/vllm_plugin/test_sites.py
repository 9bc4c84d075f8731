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
from actscale_fast.integrations.vllm.served_model import ServedModel
from actscale_fast.integrations.vllm.sites import _not_plain, _not_whole_output, _projection, attention_sites

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
    found = _projection(modules, "attn", block.attn, HIDDEN, torch.float32)
    assert "forward" not in vars(block.attn)
    assert not any(module._forward_pre_hooks for module in modules.values())
    if not isinstance(found, str):
        assert found is block.o_proj
    return found if isinstance(found, str) else None


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


def bare(cls: type[nn.Module], **values: Any) -> Any:
    """A layer of vLLM with nothing but these attributes."""
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_only_the_attention_of_a_decoder_has_plain_heads() -> None:
    from vllm.model_executor.layers.attention import Attention, CrossAttention, EncoderOnlyAttention, MLAAttention
    from vllm.v1.attention.backend import AttentionType

    plain = {"attn_type": AttentionType.DECODER, "num_heads": HEADS, "head_size": WIDTH, "head_size_v": WIDTH}
    assert _not_plain(bare(Attention, **plain), HEADS, WIDTH) is None
    for cls, values, reason in (
        (MLAAttention, {}, "a MLAAttention, whose output is not that of plain heads"),
        (CrossAttention, {"attn_type": AttentionType.ENCODER_DECODER}, ""),
        (EncoderOnlyAttention, {"attn_type": AttentionType.ENCODER_ONLY}, ""),
        (Attention, {"attn_type": AttentionType.ENCODER}, "expected the attention of a decoder"),
        (Attention, {"num_heads": 2 * HEADS}, "8 heads of width 32 (values: 32), expected 4 of 32 on this rank"),
        (Attention, {"head_size_v": 16}, "4 heads of width 32 (values: 16), expected 4 of 32 on this rank"),
    ):
        found = _not_plain(bare(cls, **plain | values), HEADS, WIDTH)
        assert found is not None
        assert reason in found


def test_every_layer_must_have_attention() -> None:
    served = ServedModel("m", ("llama",), 2, HEADS, WIDTH, HIDDEN, ("ActivScalar",), 1, "x")
    with pytest.raises(
        ValueError, match=r"attention was found in 0 of 2 layers \(not in 0, 1\); start the server without"
    ):
        attention_sites(nn.Linear(2, 2), served, rank=0, size=1, dtype=torch.float32)


def test_vectors_at_the_output_need_a_projection_that_sums_over_the_ranks() -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    class Other(RowParallelLinear):
        def forward(self, input_: Tensor) -> Tensor:
            raise AssertionError

    def projection(cls: type = RowParallelLinear, **values: Any) -> Any:
        return bare(cls, **{"output_size": HIDDEN, "reduce_results": True, "tp_size": 2, **values})

    assert _not_whole_output(projection(), HIDDEN, 2) is None
    assert _not_whole_output(projection(reduce_results=False, tp_size=1), HIDDEN, 1) is None
    for made, size, reason in (
        (projection(reduce_results=False), 2, "does not sum over the 2 ranks itself"),
        (projection(tp_size=1), 2, "does not sum over the 2 ranks itself"),
        (projection(output_size=7), 2, "returns 7 numbers per token, expected 128"),
        (projection(Other), 1, "its projection is a Other"),
        (FakeLinear(HIDDEN, HIDDEN), 1, "its projection is a FakeLinear"),
    ):
        assert reason in (_not_whole_output(made, HIDDEN, size) or "")


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
    vectors = af.SteerVec.for_model(model, site="attn_out")  # in Gemma 2, before the norm after attention
    with torch.no_grad():
        vectors.vectors.copy_(torch.randn(vectors.vectors.shape, generator=torch.Generator().manual_seed(2)))
    vectors.save_pretrained(tmp_path / "interventions" / "o")
    asked = [params(), params(actscale="a", actscale_strength=-0.5), params(actscale="o", actscale_strength=0.7)]
    with serving(tmp_path / "model", tmp_path / "interventions") as llm:
        results = ask(llm, [(prompt, one) for one in asked])
    errors, effects = [], []
    cases: list[tuple[af.Intervention, float]] = [(scalars, 0.0), (scalars, -0.5), (vectors, 0.7)]
    for result, (intervention, strength) in zip(results, cases, strict=True):
        tokens = said(result)
        with torch.no_grad():
            plain = model(torch.tensor([[*prompt, *tokens]])).logits[0].double().log_softmax(-1)
            with af.patch(model, intervention, strength=strength):
                logits = model(torch.tensor([[*prompt, *tokens]])).logits[0].double().log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(tokens)), torch.tensor(tokens)
        errors.append(float((log_probabilities(result) - logits[at]).abs().max()))
        effects.append(float((plain - logits)[at].abs().max()))
    # Without an intervention vLLM differs from transformers by up to 4e-4: in Gemma 2, another tanh.
    assert errors[0] <= 10 * TOLERANCE
    assert max(errors[1:]) <= max(TOLERANCE, 3 * errors[0])
    assert effects[0] == 0
    assert min(effects[1:]) > 20 * max(errors)
