"""ScalarTable: requests with scalars of their own in one packed pass, with buffers that never move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from model_zoo import randomised, tiny_model
from torch import Tensor

import actscale_fast as af
from actscale_fast.architectures.layout import layout as layout_of
from actscale_fast.integrations.serving import ScalarTable

L, H, D, LENGTHS = 2, 4, 8, (5, 3, 1, 4)


def scalars(model: Any, seed: int, **where: Any) -> af.ActivScalar:
    return randomised(af.ActivScalar.for_model(model, **where), seed)  # type: ignore[return-value]


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (n,), generator=generator) for n in LENGTHS]


def packed(model: Any, ids: list[Tensor]) -> Tensor:
    """The logits of all prompts flattened into one row, as a server runs them: each sees its own tokens alone."""
    owner = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor([len(i) for i in ids]))
    position = torch.cat([torch.arange(len(i)) for i in ids])
    seen = (owner[:, None] == owner) & (position[:, None] >= position)
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]
    with torch.no_grad():
        return model(  # type: ignore[no-any-return]
            torch.cat(ids)[None], attention_mask=mask, position_ids=position[None], use_cache=False
        ).logits[0]


@pytest.fixture
def served() -> Iterator[tuple[Any, ScalarTable]]:
    model = tiny_model()
    table = ScalarTable(layout_of(model).fingerprint, slots=4, max_tokens=16)
    with table.attached(model):
        yield model, table


def test_each_request_runs_under_its_own_intervention(served: tuple[Any, ScalarTable]) -> None:
    model, table = served
    first, second = scalars(model, 1), scalars(model, 2, layers=[1])
    table.put(1, first, strength=-0.5)
    table.put(3, second)
    table.assign([1, 0, 3, 1], LENGTHS)
    found = packed(model, prompts()).split(LENGTHS)
    plain = tiny_model()
    for ids, rows, (made, strength) in zip(
        prompts(), found, [(first, -0.5), (first, 0.0), (second, 1.0), (first, -0.5)], strict=True
    ):
        with af.patch(plain, made, strength), torch.no_grad():
            torch.testing.assert_close(rows, plain(ids[None]).logits[0], rtol=1e-4, atol=1e-5)


def test_requests_without_an_intervention_keep_every_bit(served: tuple[Any, ScalarTable]) -> None:
    model, table = served
    expected = packed(tiny_model(), prompts())
    table.put(1, scalars(model, 1))
    table.assign([], [])
    assert torch.equal(packed(model, prompts()), expected)
    table.assign([1, 1, 1, 1], LENGTHS)
    assert not torch.equal(packed(model, prompts()), expected)
    table.clear(1)
    assert torch.equal(packed(model, prompts()), expected)


def test_new_scalars_slots_and_requests_compile_nothing_and_move_no_buffer() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    table = ScalarTable(layout_of(tiny_model()).fingerprint, slots=3, max_tokens=16)
    counter = CompileCounter()
    call = torch.compile(table.scale, backend=counter, fullgraph=True, dynamic=True)
    addresses = table.alpha.data_ptr(), table.index.data_ptr()
    model = tiny_model()
    for step, counts in enumerate([(5, 3, 4), (1, 1, 1), (2, 7, 3), (1, 6, 2)]):
        x = torch.randn(sum(counts), H * D)
        table.put(1 + step % 2, scalars(model, step), strength=0.5 - step)
        table.assign([step % 3, 1, 2], counts)
        rows = torch.repeat_interleave(torch.tensor([step % 3, 1, 2]), torch.tensor(counts))
        expected = x.view(-1, H, D) * (1 + table.alpha[1, rows, 0])[..., None]
        torch.testing.assert_close(call(x, 1), expected.view(x.shape))
    assert counter.frame_count == 1
    assert (table.alpha.data_ptr(), table.index.data_ptr()) == addresses


def test_ranks_of_a_tensor_parallel_projection_add_up_to_the_whole() -> None:
    model = tiny_model()
    made, fingerprint = scalars(model, 1), layout_of(model).fingerprint
    x, weight = torch.randn(6, H * D), torch.randn(32, H * D)
    whole = ScalarTable(fingerprint, max_tokens=8)
    ranks = [ScalarTable(fingerprint, max_tokens=8, heads=range(2 * r, 2 * r + 2)) for r in range(2)]
    for table in (whole, *ranks):
        table.put(1, made)
        table.assign([1, 0], [4, 2])
    parts = [
        table.scale(x[:, r * 16 : (r + 1) * 16], 0) @ weight[:, r * 16 : (r + 1) * 16].T
        for r, table in enumerate(ranks)
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole.scale(x, 0) @ weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t, m: t.put(0, scalars(m, 1)), ValueError, "slot: got 0, expected 1 to 3; 0 is the identity"),
        (lambda t, m: t.put(1, af.SteerVec.for_model(m)), TypeError, "intervention: got SteerVec, expected an Activ"),
        (lambda t, m: t.put(1, scalars(m, 1, site="mlp_out")), ValueError, "expected unstacked scalars at the head"),
        (lambda t, m: t.put(1, scalars(m, 1, positions=[0])), ValueError, "expected unstacked scalars at the head"),
        (lambda t, m: t.put(1, scalars(tiny_model("gpt2"), 1)), ValueError, "made for another model: model_type"),
        (lambda t, m: t.assign([1], [2, 3]), ValueError, "counts: got 2 for 1 slots, expected one for each"),
        (lambda t, m: t.assign([4], [2]), ValueError, "slots: got 4 to 4, expected 0 to 3"),
        (lambda t, m: t.assign([1, 1], [10, 7]), ValueError, "counts: got 17 tokens, expected 0 to max_tokens = 16"),
    ],
)
def test_what_a_slot_cannot_hold_is_refused_and_changes_nothing(
    call: Any, error: type[Exception], message: str, served: tuple[Any, ScalarTable]
) -> None:
    model, table = served
    table.put(1, scalars(model, 5))
    table.assign([1], [3])
    before = table.alpha.clone(), table.index.clone()
    with pytest.raises(error, match=message):
        call(table, model)
    assert torch.equal(table.alpha, before[0])
    assert torch.equal(table.index, before[1])


def test_a_rank_takes_its_own_heads_alone_and_no_more_tokens_than_it_has_room_for() -> None:
    model = tiny_model()
    fingerprint = layout_of(model).fingerprint
    rank = ScalarTable(fingerprint, max_tokens=8, heads=range(2))
    with pytest.raises(ValueError, match=r"x: got 32 channels, expected 2 heads · 8 = 16"):
        rank.scale(torch.ones(3, 32), 0)
    with pytest.raises(ValueError, match=r"x: got 9 tokens, expected at most max_tokens = 8"):
        rank.scale(torch.ones(9, 16), 0)
    with pytest.raises(ValueError, match=r"heads: the table has range\(0, 2\)"), rank.attached(model):
        pass


def test_the_buffers_stay_float32_and_out_of_the_state_dict() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        table = ScalarTable(layout_of(tiny_model()).fingerprint)
    finally:
        torch.set_default_dtype(before)
    table.put(1, scalars(tiny_model(), 1))
    values = table.alpha.clone()
    assert torch.equal(table.half().alpha, values)
    assert table.alpha.dtype == torch.float32
    assert not table.state_dict()
    with pytest.raises(ValueError, match="strength: got nan"):
        table.put(1, scalars(tiny_model(), 1), strength=float("nan"))


@pytest.mark.parametrize("heads", [range(3, 6), range(0), range(0, 4, 2)])
def test_heads_that_the_model_does_not_have_are_refused(heads: range) -> None:
    with pytest.raises(ValueError, match="heads: got range"):
        ScalarTable(layout_of(tiny_model()).fingerprint, heads=heads)
