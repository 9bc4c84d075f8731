"""Interchange interventions against a derivation by hand: hooks, one token at a time, the formula as it is written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from das_cases import by_hand, exact, hooked
from model_zoo import IDS, randomised, tiny_model
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast.das.boundless_das import BoundlessDAS
from actscale_fast.frozen.reader import Reader
from actscale_fast.interventions import Intervention

MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])  # left-padded
POSITIONS = [-1, 1]
COLUMNS = [[5, 3], [5, 1], [5, 2]]  # where these stand in each row


def made(model: nn.Module, seed: int = 1, temperature: float = 2.0, **kwargs: Any) -> BoundlessDAS:
    """An interchange whose parameters are all away from where they begin."""
    das = BoundlessDAS.for_model(model, **{"layers": [0, 1], "positions": POSITIONS, "seed": 7} | kwargs)
    randomised(das, seed, 0.3)
    with torch.no_grad():
        das.boundary.copy_(torch.linspace(0.2, 0.8, das.boundary.numel()).view_as(das.boundary))
        das.temperature.fill_(temperature)
    return das


def random_source(das: BoundlessDAS, n_rows: int = 3, seed: int = 5) -> Tensor:
    where = das.location
    shape = (n_rows, len(where.layers), where.n_slots, where.n_heads, where.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=das.boundary.dtype)


def forward(model: nn.Module, ids: Tensor = IDS, mask: Tensor | None = MASK) -> Tensor:
    result: Tensor = model(ids, attention_mask=mask).logits
    return result


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("site", ["residual", "head"])
def test_logits_and_gradients_are_those_of_the_formula(kind: str, site: str) -> None:
    model = tiny_model(kind, dtype=torch.float64).requires_grad_(False)
    das = exact(made(model, site=site))
    source = random_source(das)
    parameters = list(das.parameters())
    with das.interchange(source), af.patch(model, das, strength=0.7):
        found = forward(model)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = torch.autograd.grad((found * weights).sum(), parameters)
    with hooked(model, kind, das, source, COLUMNS, 0.7):
        expected = forward(model)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), parameters)
    assert (found - forward(model)).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-9)


def test_gradients_reach_the_hidden_states_below_and_the_source() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    das = exact(made(model))
    source = random_source(das).requires_grad_()
    embedding = model.get_input_embeddings().weight
    with das.interchange(source), af.patch(model, das):
        found = torch.autograd.grad(forward(model).square().sum(), [embedding, source])
    with hooked(model, "llama", das, source, COLUMNS):
        expected = torch.autograd.grad(forward(model).square().sum(), [embedding, source])
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-8)


def test_rows_have_strengths_of_their_own_and_zero_is_the_identity() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    das = exact(made(model))
    source = random_source(das)
    with torch.no_grad():
        with das.interchange(source), af.patch(model, das, strength=torch.tensor([0.0, 1.0, -1.0])):
            found = forward(model)
        for row, beta in enumerate((0.0, 1.0, -1.0)):
            with hooked(model, "llama", das, source, COLUMNS, beta):
                torch.testing.assert_close(found[row], forward(model)[row], rtol=1e-9, atol=1e-9)
        assert torch.equal(found[0, 2:], forward(model)[0, 2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_taken_from_the_same_prompt_changes_nothing_at_all(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    das = made(model, layers=[1])
    with torch.no_grad():
        seen: list[Tensor] = []
        handle = model.model.layers[1].register_forward_hook(lambda _, __, output: seen.append(output))
        plain = forward(model)
        handle.remove()
        source = torch.stack([seen[0][row, columns] for row, columns in enumerate(COLUMNS)])[:, None, :, None]
        with das.interchange(source), af.patch(model, das):
            assert torch.equal(forward(model), plain)


def test_a_mask_of_ones_is_plain_activation_patching_and_one_of_zeros_nothing() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    das = exact(made(model, layers=[1], temperature=0.0))
    source = random_source(das)
    with torch.no_grad():
        das.boundary.fill_(1.0)
        assert torch.equal(das.mask(0), torch.ones(2, 1, 32, dtype=torch.float64))

        def swap(_: Any, __: Any, output: Tensor) -> Tensor:
            output = output.clone()
            for row, columns in enumerate(COLUMNS):
                output[row, columns] = source[row, 0, :, 0]
            return output

        with das.interchange(source), af.patch(model, das):
            found = forward(model)
        handle = model.model.layers[1].register_forward_hook(swap)
        torch.testing.assert_close(found, forward(model), rtol=1e-9, atol=1e-9)
        handle.remove()
        das.mask = lambda layer: torch.zeros(2, 1, 32)  # type: ignore[method-assign]
        with das.interchange(source), af.patch(model, das):
            found = forward(model)
        assert torch.equal(found, forward(model))


def test_the_mask_hardens_as_the_temperature_falls() -> None:
    das = made(tiny_model("llama"), positions=[-1], layers=[0])
    with torch.no_grad():
        das.boundary.fill_(0.3)  # 9.6 of 32 coordinates
        distances = []
        for temperature in (50.0, 5.0, 0.5, 0.05, 0.005):
            das.temperature.fill_(temperature)
            mask = das.mask(0)[0, 0]
            hard = (torch.arange(32) < 9.6).float()
            distances.append(float((mask - hard)[1:].abs().max()))  # coordinate 0 stays half in
            assert float(mask[0]) <= 0.5
        assert distances == sorted(distances, reverse=True)
        assert distances[-1] < 1e-6
        das.temperature.fill_(0.0)
        assert torch.equal(das.mask(0)[0, 0], hard)


def test_a_bfloat16_model_is_rotated_in_float32_and_rounded_once() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    das = made(model, layers=[0], positions=[-1])
    x = torch.randn(3, 6, 1, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    source = random_source(das)
    placement = af.interventions.Placement(index=torch.tensor([[1, 1, 1, 1, 1, 0]]))
    with torch.no_grad(), das.interchange(source):
        found = das.edit(x, 0, 1.0, placement)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(das.edit(x, 0, 1.0, placement), found)
        rotation, mask = (value.double() for value in by_hand(das, 0, 0, 0))
        h, s = x[:, -1, 0].double(), source[:, 0, 0, 0].double()
        exact = h + ((s - h) @ rotation.T * mask) @ rotation
    assert torch.equal(found[:, :-1], x[:, :-1])
    error = (found[:, -1, 0].double() - exact).abs()
    assert bool((error <= exact.abs() * 2**-8 + 1e-5).all())  # half of bfloat16's last digit


def test_a_position_outside_a_prompt_does_nothing_and_disturbs_no_other() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    das = exact(made(model, positions=[0, 4, -1]))
    source = random_source(das)
    columns = [[2, 99, 5], [0, 4, 5], [1, 99, 5]]  # rows of 4, 6 and 5 tokens; position 4 of the last is position −1
    with torch.no_grad():
        with das.interchange(source), af.patch(model, das):
            found = forward(model)
        swapped = source.clone()
        swapped[2, :, 2] = source[2, :, 1]
        for row, expected_source, columns_of_row in ((0, source, columns), (1, source, columns)):
            with hooked(model, "llama", das, expected_source, columns_of_row):
                torch.testing.assert_close(found[row], forward(model)[row], rtol=1e-9, atol=1e-9)
        with hooked(model, "llama", das, source, [[99, 99, 99], [99, 99, 99], [1, 5, 99]]):  # the first listed counts
            torch.testing.assert_close(found[2], forward(model)[2], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_generation_with_left_padding_and_a_cache_is_that_of_a_recomputing_loop() -> None:
    model = tiny_model("llama")
    das = made(model)
    source = 3 * random_source(das)
    sizes = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with das.interchange(source), af.patch(model, das):
        found = model.generate(IDS, attention_mask=MASK, **sizes)
    ids, mask = IDS, MASK
    with hooked(model, "llama", das, source, COLUMNS):
        for _ in range(6):
            scores = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
            scores[:, 2] = -torch.inf  # the end of a sequence, which min_new_tokens rules out
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(found, ids)
    assert not torch.equal(found, model.generate(IDS, attention_mask=MASK, **sizes))


@torch.no_grad()
def test_beams_share_the_source_of_their_prompt() -> None:
    model = tiny_model("llama")
    das = made(model)
    source = 3 * random_source(das)
    sizes = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    with af.patch(model, das):
        with das.interchange(source):
            together = model.generate(IDS, attention_mask=MASK, **sizes)
        for row in range(3):
            with das.interchange(source[row : row + 1]):
                alone = model.generate(IDS[row : row + 1], attention_mask=MASK[row : row + 1], **sizes)
            assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()


@pytest.mark.parametrize("kind", ["opt", "falcon", "gemma2", "gpt_neox"])
@torch.no_grad()
def test_the_last_tokens_of_a_family_are_swapped(kind: str) -> None:
    model = tiny_model(kind)
    das = made(model, layers=[0], positions=[-1], temperature=0.0)
    das.boundary.fill_(1.0)
    other = IDS.flip(0)
    with Reader(model, "residual", [0]) as read:
        source = read(other, MASK)[:, :, -1:].transpose(0, 1)
    with das.interchange(source), af.patch(model, das), Reader(model, "residual", [0]) as read:
        found = read(IDS, MASK)[0]
    torch.testing.assert_close(found[:, -1:], source[:, 0], rtol=1e-4, atol=1e-4)


def test_an_unchanged_rotation_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").requires_grad_(False)
    das = made(model)
    counts = [0, 0]

    def counted(index: int) -> Any:
        def count(*_: Any) -> None:
            counts[index] += 1

        return count

    for index, rotation in enumerate(das.rotations):
        rotation.parametrizations.weight[0].register_forward_hook(counted(index))
    source = random_source(das)
    with das.interchange(source), af.patch(model, das):
        with torch.no_grad():
            for _ in range(3):
                forward(model)
            assert counts == [1, 1]
            das.rotations[1].free.add_(0.01)
            forward(model)
            assert counts == [1, 2]
        with torch.inference_mode():
            forward(model)
        assert counts == [1, 2]
        with das.shared_rotation():  # a step of two passes
            for _ in range(2):
                forward(model).square().mean().backward()
            assert counts == [2, 3]
        forward(model)  # with gradients, outside a step: each layer's once a pass
        assert counts == [3, 4]
        das.requires_grad_(False)
        forward(model)
        assert counts == [3, 4]


def test_a_shared_rotation_has_the_gradients_of_passes_by_themselves() -> None:
    model = tiny_model("llama", dtype=torch.float64).requires_grad_(False)
    das = exact(made(model))
    with das.interchange(random_source(das)), af.patch(model, das):
        for _ in range(2):
            forward(model).square().mean().backward()
        expected = [parameter.grad.clone() for parameter in das.parameters()]
        das.zero_grad()
        with das.shared_rotation():
            for _ in range(2):
                forward(model).square().mean().backward()
    for parameter, gradient in zip(das.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_rotations_stay_orthogonal_while_they_are_learned() -> None:
    model = tiny_model("llama").requires_grad_(False)
    das = BoundlessDAS.for_model(model, layers=[0, 1], positions=[-1])
    before = das.rotation
    adam = torch.optim.Adam(das.parameters(), lr=0.1)
    with das.interchange(random_source(das)), af.patch(model, das):
        for _ in range(20):
            adam.zero_grad()
            forward(model)[:, -1].square().mean().backward()
            adam.step()
    rotation = das.rotation
    assert (rotation - before).abs().max() > 0.1
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(32).expand_as(rotation), rtol=0, atol=1e-5)


def test_the_seed_decides_the_rotations_and_leaves_the_callers_generator_alone() -> None:
    model = tiny_model("llama")
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first, again, other = (
        BoundlessDAS.for_model(model, layers=[0], positions=[-1], seed=seed).rotation for seed in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@torch.no_grad()
def test_a_saved_interchange_gives_the_same_bits(tmp_path: Path) -> None:
    model = tiny_model("llama")
    das = made(model, site="head", temperature=0.3)
    das.save_pretrained(tmp_path)
    loaded = af.load_intervention(tmp_path)
    assert isinstance(loaded, BoundlessDAS)
    assert torch.equal(loaded.rotation, das.rotation)
    assert loaded.location == das.location
    source, found = random_source(das), []
    for each in (das, loaded, copy.deepcopy(loaded)):
        with each.interchange(source), af.patch(model, each):
            found.append(forward(model))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_is_no_rotation_is_not_loaded(tmp_path: Path) -> None:
    das = made(tiny_model("llama"))
    tensors = {name: tensor.detach().clone() for name, tensor in das.saved_tensors().items()}
    tensors["rotation"][0, 0, 0, 0, 0] += 0.1
    with pytest.raises(ValueError, match=r"rotation: R·Rᵀ is off the identity by 0\.\d+, expected an orthogonal"):
        das.restore(tensors)
    tensors["rotation"][0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="rotation: R·Rᵀ is off the identity by nan"):
        das.restore(tensors)
    tensors = das.saved_tensors() | {"temperature": torch.tensor(-1.0)}
    with pytest.raises(ValueError, match=r"temperature: got -1\.0, expected a finite number >= 0"):
        das.restore(tensors)


@torch.no_grad()
def test_a_part_of_a_composite_is_interchanged_too() -> None:
    model = tiny_model("llama")
    das, vector = made(model, layers=[0]), randomised(af.SteerVec.for_model(model, site="mlp_out", layers=[1]))
    with das.interchange(random_source(das)):
        with af.patch(model, vector), af.patch(model, das, strength=0.5):
            expected = forward(model)
        with af.patch(model, 0.5 * das + vector):
            assert torch.equal(forward(model), expected)


@torch.no_grad()
def test_a_compiled_model_sees_the_interchange() -> None:
    model = tiny_model("llama")
    das = made(model)
    source = random_source(das)
    with das.interchange(source), af.patch(model, das):
        expected = forward(model)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(forward(compiled), expected, rtol=1e-5, atol=1e-5)
        das.rotations[0].free.add_(0.3)
        torch.testing.assert_close(forward(compiled), forward(model), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(forward(model), expected, atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": None}, "positions: got None, expected a list: an interchange pairs tokens of the base"),
        ({"positions": [-1], "generated": True}, "generated: got True, but the source is a prompt"),
        ({"positions": []}, "positions: got none, expected at least one"),
        ({"positions": [-1], "layers": [9]}, "layers: got 9, expected -2 to 1"),
    ],
)
def test_places_without_a_partner_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoundlessDAS.for_model(tiny_model("llama"), **{"layers": [0]} | arguments)


def test_a_pass_without_sources_says_what_to_call() -> None:
    model = tiny_model("llama")
    das = made(model)
    with af.patch(model, das), pytest.raises(RuntimeError, match=r"das\.interchange\(source_activations\(model"):
        forward(model)
    wrong_rows = pytest.raises(ValueError, match="source: got 2 rows for a batch of 3, expected one each")
    with das.interchange(random_source(das, 2)), af.patch(model, das), wrong_rows:
        forward(model)
    with af.patch(model, das), pytest.raises(RuntimeError, match="ran without the source's activations"):
        forward(model)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([1.0], TypeError, "source: got list, expected a floating-point tensor"),
        (torch.zeros(3, 2, 2, 1, 32, dtype=torch.int64), TypeError, "source: got torch.int64, expected a floating"),
        (torch.zeros(3, 2, 1, 32), ValueError, r"source: got shape \(3, 2, 1, 32\), expected .* = \[B, 2, 2, 1, 32\]"),
        (torch.zeros(3, 2, 2, 1, 31), ValueError, r"source: got shape \(3, 2, 2, 1, 31\)"),
        (torch.zeros(0, 2, 2, 1, 32), ValueError, r"source: got shape \(0, 2, 2, 1, 32\)"),
    ],
)
def test_sources_of_another_shape_are_refused(source: Any, error: type[Exception], message: str) -> None:
    das = made(tiny_model("llama"))
    with pytest.raises(error, match=message), das.interchange(source):
        pass


def test_interchanges_are_neither_stacked_nor_merged() -> None:
    model = tiny_model("llama")
    das = made(model)
    with pytest.raises(ValueError, match="BoundlessDAS cannot be stacked"):
        BoundlessDAS.stack([das, das])
    with pytest.raises(ValueError, match="n_groups: a BoundlessDAS is not stacked"):
        BoundlessDAS(das.location, n_groups=2)
    with pytest.raises(ValueError, match="it has positions"):
        af.merge(model, das)


def test_counts_are_of_free_numbers() -> None:
    das: Intervention = made(tiny_model("llama"))
    assert das.n_parameters == das.n_active == 4 * (32 * 31 // 2 + 1)
    assert das.l1 == pytest.approx(0.2 + 0.4 + 0.6 + 0.8)
