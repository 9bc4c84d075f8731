"""Which prompt a pass belongs to, where somebody else than the patched model's own generate() runs it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from model_zoo import IDS, OTHER, PROMPT, logits, scalars, tiny_model
from oracle.table import architectures
from oracle.tiny import tiny_model as tiny_architecture
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor as Guidance

import actscale_fast as af
from actscale_fast.architectures.arguments import cache_argument

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("how", ["class", "before", "base"])
def test_a_generate_that_does_not_say_where_its_prompt_ends_is_right_with_a_cache_and_refused_without(how: str) -> None:
    model = tiny_model()
    unbound = type(model).generate
    before = model.generate
    intervention = scalars(model, positions=[-1], generated=True)
    target = model.model if how == "base" else model
    with torch.no_grad():
        with af.patch(model, intervention):
            expected = model.generate(PROMPT, **GREEDY)
        with af.patch(target, intervention):
            calls = {
                "class": lambda **options: unbound(model, PROMPT, **GREEDY, **options),
                "before": lambda **options: before(PROMPT, **GREEDY, **options),
                "base": lambda **options: model.generate(PROMPT, **GREEDY, **options),
            }
            call = calls[how]
            assert torch.equal(call(), expected)
            with pytest.raises(ValueError, match="generate\\(\\) was not called on the patched model itself"):
                call(use_cache=False)


def test_a_loop_of_the_callers_may_score_something_else_first_and_begin_caches_anew() -> None:
    model = tiny_model()
    intervention = scalars(model, positions=[-1], generated=True)

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        model(OTHER, use_cache=False)
        for _ in range(4):
            fresh = {cache_argument(model): DynamicCache(config=model.config), "use_cache": True}
            token = model(input_ids, **fresh).logits[:, -1:].argmax(-1)
            input_ids = torch.cat([input_ids, token], 1)
        return input_ids

    with torch.no_grad(), af.patch(model, intervention):
        expected = model.generate(PROMPT, **GREEDY | {"max_new_tokens": 4})
        assert torch.equal(model.generate(PROMPT, custom_generate=loop), expected)


def test_guidance_handed_over_without_a_cache_is_refused_with_positions() -> None:
    model = tiny_model()
    processor = LogitsProcessorList([Guidance(3.0, model, unconditional_ids=OTHER, use_cache=False)])
    with (
        torch.no_grad(),
        af.patch(model, scalars(model, positions=[-1])),
        pytest.raises(ValueError, match="another sequence than the one that is generated goes on without a KV cache"),
    ):
        model.generate(PROMPT, logits_processor=processor, **GREEDY)


@pytest.mark.parametrize("use_cache", [None, True])
def test_packed_rows_beside_a_cache_are_refused_because_attention_would_mix_them(use_cache: bool | None) -> None:
    model = tiny_model()
    packed, places = torch.cat([PROMPT, OTHER], 1), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    with (
        torch.no_grad(),
        af.patch(model, scalars(model, positions=[-1])),
        pytest.raises(ValueError, match="transformers separates these only without a KV cache; pass use_cache=False"),
    ):
        model(packed, position_ids=places, use_cache=use_cache)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_of_a_learned_prompt_are_refused_with_positions(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model()
    wrapped = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="PEFT puts virtual tokens before the prompt"):
        af.patch(wrapped, scalars(model, positions=[-1]))
    with torch.no_grad(), af.patch(wrapped, scalars(model)):
        wrapped(PROMPT)


def test_requests_that_are_packed_into_rows_are_refused_with_positions() -> None:
    model = tiny_model()
    if not hasattr(model, "generate_batch"):
        pytest.skip("this transformers has no continuous batching")
    with af.patch(model, scalars(model, positions=[-1])), pytest.raises(ValueError, match="continuous batching packs"):
        model.generate_batch([[5, 9, 12]])


def test_a_pass_in_another_thread_is_refused_while_one_runs() -> None:
    model = tiny_model()
    errors: list[str] = []
    inner = type(model.model.layers[0].mlp).forward

    def other() -> None:
        try:
            with torch.no_grad():
                model(IDS)
        except RuntimeError as error:
            errors.append(str(error))

    class Slow(type(model.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            if not errors and threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
            return inner(self, x)

    with torch.no_grad(), af.patch(model, scalars(model)):
        expected = logits(model)
        model.model.layers[0].mlp.__class__ = Slow
        assert torch.equal(logits(model), expected)
    assert errors
    assert "running in another thread" in errors[0]


def test_layers_that_run_the_last_tokens_alone_are_steered_at_them() -> None:
    from oracle.tiny import OVERRIDES

    if "gemma4_text" not in architectures():
        pytest.skip(f"transformers {transformers.__version__} has no Gemma 4")
    changed = OVERRIDES.get("gemma4_text", {}) | {"num_kv_shared_layers": 2}
    before = OVERRIDES.get("gemma4_text")
    OVERRIDES["gemma4_text"] = changed
    try:
        model = tiny_architecture("gemma4_text", "Gemma4ForCausalLM")
    finally:
        OVERRIDES["gemma4_text"] = before or {}
    intervention = scalars(model, positions=[-1, 0])
    with torch.no_grad(), af.patch(model, intervention):
        whole = model(PROMPT, use_cache=False).logits[:, -1]
        last = model(PROMPT, use_cache=False, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-4)


def test_a_class_that_is_changed_under_a_patch_survives_its_removal() -> None:
    model = tiny_model()
    projection = model.model.layers[0].self_attn.o_proj
    expected = logits(model)
    applied = af.patch(model, scalars(model))
    nn.utils.parametrize.register_parametrization(projection, "weight", nn.Identity())
    applied.remove()
    assert torch.equal(logits(model), expected)
    assert projection.weight.shape == (32, 32)
