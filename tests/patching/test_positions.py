"""Positions mean the same in the prompt and while decoding, with and without a KV cache, under padding on either side.

The goldens are made by plain hooks of the test's own, which scale chosen columns of a full forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from model_zoo import PROMPT, tiny_model
from torch import Tensor, nn

from actscale_fast.architectures.arguments import cache_argument
from actscale_fast.interventions import ActivScalar, Intervention, SteerVec
from actscale_fast.patching.patch import patch
from actscale_fast.patching.token_slots import slot_index

FAMILIES = ["llama", "gpt2", "opt", "bloom", "gemma3_text"]


def scalars(model: nn.Module, positions: list[int] | None, generated: bool = False, site: str = "head") -> ActivScalar:
    intervention = ActivScalar.for_model(model, site=site, positions=positions, generated=generated)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        intervention.alpha.copy_(torch.randn(intervention.alpha.shape, generator=generator))
    return intervention


@contextlib.contextmanager
def by_hand(model: nn.Module, intervention: ActivScalar, columns: list[int | None]) -> Iterator[None]:
    """Scale by plain hooks: `columns[c]` is the slot of column c of the full sequence, None for no change."""
    width = intervention.location.width
    handles = []
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    names = {"opt": "self_attn.out_proj", "gpt2": "attn.c_proj", "bloom": "self_attention.dense"}
    for layer, alpha in zip(layers, intervention.alpha.detach(), strict=True):

        def hook(_: nn.Module, args: tuple[Tensor, ...], alpha: Tensor = alpha) -> tuple[Tensor, ...]:
            scale = torch.ones_like(args[0])
            for column, slot in enumerate(columns[: args[0].shape[1]]):
                if slot is not None:
                    scale[:, column] = 1 + alpha[slot].repeat_interleave(width)
            return (args[0] * scale, *args[1:])

        name = names.get(intervention.location.model.model_type, "self_attn.o_proj")
        handles.append(layer.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def greedy_by_hand(
    model: nn.Module, intervention: ActivScalar, prompt_slots: list[int | None], slot: int | None
) -> Tensor:
    """Logits of each of four greedy steps, by full forward passes without a cache."""
    ids, steps = PROMPT, []
    for _ in range(4):
        with by_hand(model, intervention, prompt_slots + [slot] * 4), torch.no_grad():
            steps.append(model(ids, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, steps[-1].argmax(-1, keepdim=True)], 1)
    return torch.stack(steps, 1)


def generated_logits(model: nn.Module, prompt: Tensor = PROMPT, **kwargs: object) -> Tensor:
    out = model.generate(  # type: ignore[operator]
        prompt,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("cache", ["dynamic", "none", "static"])
@pytest.mark.parametrize("generated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_steers_the_same_tokens_as_full_passes_by_hand(family: str, generated: bool, cache: str) -> None:
    if cache == "static" and family not in ("llama", "gemma3_text"):
        cache = "dynamic"  # the others have no static cache
    model = tiny_model(family)
    intervention = scalars(model, [0, -1], generated)
    expected = greedy_by_hand(model, intervention, [0, None, None, None, 1], 2 if generated else None)
    plain = generated_logits(model)
    kwargs = {"dynamic": {}, "none": {"use_cache": False}, "static": {"cache_implementation": "static"}}[cache]
    with patch(model, intervention):
        torch.testing.assert_close(generated_logits(model, **kwargs), expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.05
    assert torch.equal(generated_logits(model), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_positions_steers_every_token_in_the_prompt_and_in_decoding(family: str) -> None:
    model = tiny_model(family)
    intervention = scalars(model, None)
    expected = greedy_by_hand(model, intervention, [0] * 5, 0)
    with patch(model, intervention):
        torch.testing.assert_close(generated_logits(model), expected, rtol=1e-4, atol=1e-4)


def test_generated_alone_leaves_the_prompt_untouched() -> None:
    model = tiny_model("llama")
    intervention = scalars(model, [], generated=True)
    expected = greedy_by_hand(model, intervention, [None] * 5, 0)
    with patch(model, intervention):
        torch.testing.assert_close(generated_logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [2, 3])
def test_a_chunked_prefill_counts_positions_over_the_whole_prompt(chunk: int) -> None:
    from transformers import DynamicCache

    model = tiny_model("llama")
    intervention = scalars(model, [1, -1])
    with patch(model, intervention):
        expected = generated_logits(model)
        chunked = {"prefill_chunk_size": chunk, cache_argument(model): DynamicCache(config=model.config)}
        torch.testing.assert_close(generated_logits(model, **chunked), expected, rtol=1e-4, atol=1e-4)


def test_assisted_generation_gives_the_tokens_of_plain_greedy_search() -> None:
    model, assistant = tiny_model("llama"), tiny_model("llama", seed=1, num_hidden_layers=1)
    with patch(model, scalars(model, [0, -1], generated=True)):
        expected = model.generate(PROMPT, max_new_tokens=8, do_sample=False)
        found = model.generate(PROMPT, max_new_tokens=8, do_sample=False, assistant_model=assistant)
    assert torch.equal(found, expected)
    assert not torch.equal(model.generate(PROMPT, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("site", ["head", "attn_out", "mlp_out", "residual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_equals_each_row_alone(family: str, site: str, side: str) -> None:
    model = tiny_model(family)
    intervention = scalars(model, [0, 1, -1], site=site)
    rows = [torch.tensor([5, 9, 12]), torch.tensor([7, 30, 8, 8, 41, 3]), torch.tensor([19])]
    ids, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    spans = [slice(6 - len(row), 6) if side == "left" else slice(0, len(row)) for row in rows]
    for index, (row, span) in enumerate(zip(rows, spans, strict=True)):
        ids[index, span], mask[index, span] = row, 1
    takes_positions = "position_ids" in model.forward.__code__.co_varnames or family in ("llama", "gpt2", "gemma3_text")
    places = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes_positions and family != "bloom" else {}
    with patch(model, intervention), torch.no_grad():
        batch = model(ids, attention_mask=mask, **places).logits
        for index, (row, span) in enumerate(zip(rows, spans, strict=True)):
            alone = model(row[None]).logits[0]
            torch.testing.assert_close(batch[index, span], alone, rtol=1e-4, atol=1e-4)


def test_left_padded_generation_equals_each_row_alone_without_a_mask_too() -> None:
    model = tiny_model("llama")
    intervention = scalars(model, [0, -1], generated=True)
    ids = torch.tensor([[0, 0, 5, 9, 12], [7, 30, 8, 41, 3]])
    with patch(model, intervention):
        for kwargs in (
            {"attention_mask": (ids != 0).long()},
            {},
            {"use_cache": False},
            {"cache_implementation": "static"},
        ):
            batch = generated_logits(model, ids, **kwargs)
            torch.testing.assert_close(batch[:1], generated_logits(model, ids[:1, 2:]), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(batch[1:], generated_logits(model, ids[1:]), rtol=1e-4, atol=1e-4)


def test_beams_and_returned_sequences_follow_their_prompts_row() -> None:
    model = tiny_model("llama")
    intervention = scalars(model, [0, -1], generated=True)
    ids = torch.tensor([[0, 0, 5, 9, 12], [7, 30, 8, 41, 3]])
    mask = (ids != 0).long()
    strength = torch.tensor([1.0, -0.5])
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with patch(model, intervention, strength):
        both = model.generate(ids, attention_mask=mask, **beams)
    for row in range(2):
        with patch(model, intervention, strength[row].item()):
            alone = model.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **beams)
        assert torch.equal(both[2 * row : 2 * row + 2], alone)


def test_sampling_with_positions_repeats_under_one_seed() -> None:
    model = tiny_model("llama")
    with patch(model, scalars(model, [0], generated=True)):
        runs = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            runs.append(
                model.generate(PROMPT, do_sample=True, max_new_tokens=6, num_return_sequences=3, use_cache=use_cache)
            )
    assert torch.equal(*runs)


def test_a_hand_written_loop_announces_its_prompt() -> None:
    model = tiny_model("llama")
    intervention = scalars(model, [0, -1], generated=True)
    full = torch.cat([PROMPT, torch.tensor([[17, 23]])], 1)
    with by_hand(model, intervention, [0, None, None, None, 1, 2, 2]), torch.no_grad():
        expected = model(full).logits
    with patch(model, intervention) as handle, torch.no_grad():
        with handle.prompt(5):
            torch.testing.assert_close(model(full, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        first = model(PROMPT, use_cache=True)  # an empty cache begins a prompt, a filled one is past it
        torch.testing.assert_close(first.logits, expected[:, :5], rtol=1e-4, atol=1e-4)
        name = cache_argument(model)
        rest = model(full[:, 5:], **{name: first[name]})
        torch.testing.assert_close(rest.logits, expected[:, 5:], rtol=1e-4, atol=1e-4)
        with (
            pytest.raises(ValueError, match=r"mask: got shape \(1, 4\), expected \(B, 5\)"),
            handle.prompt(5, torch.ones(1, 4)),
        ):
            pass


def test_the_base_model_and_embeddings_as_input_place_positions_alike() -> None:
    model = tiny_model("llama")
    intervention = scalars(model, [1, -1])
    with patch(model, intervention), torch.no_grad():
        expected = model.model(PROMPT).last_hidden_state
        embeds = model.get_input_embeddings()(PROMPT)
        assert torch.equal(model.model(inputs_embeds=embeds).last_hidden_state, expected)
        assert torch.equal(model(inputs_embeds=embeds).logits, model(PROMPT).logits)
        torch.testing.assert_close(generated_logits(model, None, inputs_embeds=embeds), generated_logits(model))


def test_steering_vectors_land_on_their_positions() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    vectors = SteerVec.for_model(model, site="residual", layers=[1], positions=[-2])
    torch.nn.init.normal_(vectors.vectors)
    model.model.norm = nn.Identity()
    with torch.no_grad():
        before = model.model(PROMPT).last_hidden_state
        with patch(model, vectors, strength=0.5):
            change = model.model(PROMPT).last_hidden_state - before
    expected = torch.zeros_like(change)
    expected[:, 3] = 0.5 * vectors.vectors[0, 0, 0].detach()
    torch.testing.assert_close(change, expected)


def test_a_layer_called_by_itself_has_no_positions() -> None:
    model = tiny_model("llama")
    projection = model.model.layers[0].self_attn.o_proj
    with patch(model, scalars(model, [0])), pytest.raises(RuntimeError, match="outside its model's forward pass"):
        projection(torch.randn(1, 3, 32))
    everywhere = scalars(model, None)
    with patch(model, everywhere):
        assert projection(torch.randn(1, 3, 32)).shape == (1, 3, 32)


def test_a_four_dimensional_mask_needs_the_prompt_announced() -> None:
    model = tiny_model("llama")
    causal = torch.ones(5, 5).tril().bool()[None, None]
    with patch(model, scalars(model, [0])) as handle, torch.no_grad():
        with pytest.raises(ValueError, match="positions need the 2-D mask"):
            model(PROMPT, attention_mask=causal)
        with handle.prompt(5):
            torch.testing.assert_close(model(PROMPT, attention_mask=causal).logits, model(PROMPT).logits)


def test_packed_sequences_are_refused() -> None:
    model = tiny_model("llama")
    with patch(model, scalars(model, [0])), pytest.raises(ValueError, match="packed sequences have no rows"):
        model(PROMPT, cu_seq_lens_q=torch.tensor([0, 2, 5], dtype=torch.int32))


@pytest.mark.parametrize(
    ("wanted", "past", "length", "mask", "generated", "expected"),
    [
        ([0, -1], 0, 4, None, False, [[0, 2, 2, 1]]),
        ([0, -1], 0, 1, None, True, [[0, 2, 2, 2]]),  # both fall on one token: the first listed counts
        ([5, -5], 0, 4, None, False, [[2, 2, 2, 2]]),  # outside the prompt: nothing
        ([-1, 1], 2, 4, None, True, [[3, 0, 2, 2]]),  # columns 2 … 5 of a cached pass
        ([0, -1], 0, 4, [[0, 0, 1, 1], [1, 1, 1, 0]], False, [[2, 2, 0, 1], [0, 2, 1, 2]]),
        ([], 0, 2, None, True, [[1, 1, 0, 0]]),
        ([1], 0, 4, [[1, 0, 1, 1]], False, [[1, 1, 0, 1]]),  # padding in the middle never counts
    ],
)
def test_slots_of_written_examples(
    wanted: list[int], past: int, length: int, mask: list[list[int]] | None, generated: bool, expected: list[list[int]]
) -> None:
    arguments = {
        "length": length,
        "mask": None if mask is None else torch.tensor(mask).bool(),
        "generated": generated,
    }
    positions = torch.tensor(wanted, dtype=torch.int64)
    assert slot_index(positions, 4, past=past, **arguments).tolist() == expected
    assert slot_index(positions, 4, past=torch.tensor(past), **arguments).tolist() == expected


def test_unlisted_subclasses_need_only_an_edit() -> None:
    class Reverse(Intervention):
        @classmethod
        def parameter_tails(cls, location):  # type: ignore[no-untyped-def]
            return {"amount": ()}

        def edit(self, x, layer, strength, placement):  # type: ignore[no-untyped-def]
            return x + strength * placement.of(self.of_layer(self.amount, layer, x.device))[..., None, None] * x.flip(
                -1
            )

    model = tiny_model("llama")
    intervention = Reverse.for_model(model, positions=[0, -1])
    before = model(PROMPT).logits
    with patch(model, intervention):
        assert torch.equal(model(PROMPT).logits, before)
        torch.nn.init.ones_(intervention.amount)
        assert not torch.equal(model(PROMPT).logits, before)
    del Intervention.classes["Reverse"]
