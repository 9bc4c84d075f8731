"""Reader: what stands at a site, as plain hooks of a forward pass without padding see it; the model is as it was."""

from __future__ import annotations

import pytest
import torch
from frozen_cases import read_by_hand, state_of
from model_zoo import CONFIGS, IDS, SITES, scalars, tiny_model

import actscale_fast as af
from actscale_fast.architectures.layout import layout
from actscale_fast.frozen.batching import left_padded
from actscale_fast.frozen.reader import Reader


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_site_of_every_family_is_read_as_hooks_of_a_plain_forward_pass_see_it(family: str, site: str) -> None:
    model = tiny_model(
        family
    )  # float32: rows of padding alone are NaN in the eager attention of transformers in float64
    prompts = [IDS[0].tolist(), IDS[1, 2:].tolist(), IDS[2, 4:].tolist()]
    batch = left_padded(prompts, 0, torch.device("cpu"))
    right = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for row, prompt in enumerate(prompts):
        right[0][row, : len(prompt)] = torch.tensor(prompt)
        right[1][row, : len(prompt)] = 1
    with Reader(model, site, None) as read:
        found, flush, plain = read(batch), read(*right), read(IDS)
    tolerance: dict[str, float] = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(plain, read_by_hand(model, site, IDS), **tolerance)
    for row, prompt in enumerate(prompts):
        expected = read_by_hand(model, site, torch.tensor([prompt]))[:, 0]
        torch.testing.assert_close(found[:, row, -len(prompt) :], expected, **tolerance)
        torch.testing.assert_close(flush[:, row, : len(prompt)], expected, **tolerance)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_residual_stream_is_that_of_the_hidden_states(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    states = model(IDS, output_hidden_states=True).hidden_states
    with Reader(model, "residual", [0]) as read:
        torch.testing.assert_close(read(IDS)[0, :, :, 0], states[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_model_is_as_it_was(family: str) -> None:
    model = tiny_model(family)
    model.get_output_embeddings().weight.requires_grad_(False)
    model.train()
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt), Reader(model, "head", [0]) as read:  # noqa: PT012
        read(IDS)
        raise KeyboardInterrupt
    assert state_of(model) == before


def test_layers_come_in_the_callers_order_and_none_above_the_highest_runs() -> None:
    model = tiny_model(dtype=torch.float64, num_hidden_layers=4)
    everything = read_by_hand(model, "mlp_out", IDS)
    ran: list[int] = []
    with Reader(model, "mlp_out", [-2, 0]) as read:
        read(IDS)
        for index, layer in enumerate(layout(model).layers):
            layer.self_attn.register_forward_hook(lambda *_, index=index: ran.append(index))
        model.lm_head.weight.data.fill_(torch.nan)
        found = read(IDS)
    assert ran == [0, 1, 2]
    torch.testing.assert_close(found, everything[[2, 0]], rtol=1e-12, atol=1e-12)


def test_values_are_of_the_models_dtype_and_without_gradient() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    with Reader(model, "head", [1]) as read:
        found = read(IDS)
    assert found.dtype == torch.bfloat16
    assert not found.requires_grad


def test_reduce_keeps_what_it_gives_of_each_layer() -> None:
    model = tiny_model(dtype=torch.float64)
    with Reader(model, "head", [1, 0]) as read:
        assert torch.equal(read(IDS, reduce=lambda x: x[:, -1].sum(0)), read(IDS)[:, :, -1].sum(1))


def test_dropout_of_a_model_in_training_does_not_reach_it() -> None:
    model = tiny_model("gpt2", dtype=torch.float64, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    expected = read_by_hand(model, "residual", IDS)
    with Reader(model.train(), "residual", None) as read:
        torch.testing.assert_close(read(IDS), expected, rtol=1e-12, atol=1e-12)


def test_a_patch_of_the_callers_is_part_of_the_model() -> None:
    model = tiny_model(dtype=torch.float64)
    for site in ("head", "residual"):
        strength = torch.tensor([1.0, -1.0, 0.5])
        with af.patch(model, scalars(model, site=site, positions=[0, -1]), strength=strength):
            expected = read_by_hand(model, site, IDS)
            with Reader(model, site, None) as read:
                torch.testing.assert_close(read(IDS), expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(read_by_hand(model, site, IDS), expected)


def test_a_reader_opens_again() -> None:
    model = tiny_model()
    reader = Reader(model, "residual", None)
    found = []
    for _ in range(2):
        with reader as read:
            found.append(read(IDS))
    assert torch.equal(*found)
    with pytest.raises(RuntimeError, match="reader: it is not open"):
        reader(IDS)


def test_what_it_cannot_read_is_refused_by_name() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="site: got 'resid', expected one of head"):
        Reader(model, "resid", None)
    with pytest.raises(ValueError, match="layers: got 2, expected -2 to 1"):
        Reader(model, "head", [2])
    mask = torch.ones_like(IDS)
    mask[1] = 0
    with Reader(model, "head", [0]) as read:
        for error, message, *arguments in (
            (TypeError, "input_ids: got list, expected an int64 tensor", [[1, 2]]),
            (ValueError, r"input_ids: got shape \(6,\), expected \[B, T\]", IDS[0]),
            (ValueError, "input_ids: got 70 tokens, expected at most the model's 64", IDS.new_zeros(1, 70)),
            (ValueError, "input_ids: got 0 to 61, expected 0 to 60", torch.tensor([[0, 61]])),
            (ValueError, r"attention_mask: got \(3, 5\), expected \(3, 6\)", IDS, mask[:, :5]),
            (ValueError, "attention_mask: row 1 has no real token", IDS, mask),
            (TypeError, "attention_mask: a Batch has its own", left_padded([[1]], 0, IDS.device), mask),
        ):
            with pytest.raises(error, match=message):
                read(*arguments)
