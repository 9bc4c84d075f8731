"""pyvene: its class of ours, exchange both ways, and the accelerated path against its own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pyvene
import torch
import torch.nn.functional as F
from model_zoo import IDS, SITES, randomised, scalars, tiny_model
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast.integrations.pyvene import ScaleIntervention, accelerate, from_pyvene, load_pyvene, to_pyvene

BASE = {"input_ids": IDS}
HEADS = "head_attention_value_output"


def patched(model: Any, intervention: af.Intervention, strength: float = 1.0) -> Tensor:
    with torch.no_grad(), af.patch(model, intervention, strength):
        return model(IDS).logits


def run(intervenable: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return intervenable(base=BASE, **kwargs)[1].logits


def at(heads: list[int]) -> dict[str, Any]:
    """Unit locations of one intervention: these heads in every row. (pyvene reads a bare pair as source and base.)"""
    return {"base": [[heads] * 3]}


def head_scaling(model: Any, heads: int, layer: int = 1, **kwargs: Any) -> Any:
    """An IntervenableModel with random factors for this many heads of one layer, as a user configures it."""
    config = {"layer": layer, "component": HEADS, "unit": "h", "max_number_of_units": heads, **kwargs}
    intervenable = pyvene.IntervenableModel([{**config, "intervention_type": ScaleIntervention}], model)
    with torch.no_grad():
        for intervention in intervenable.interventions.values():
            intervention.alpha.copy_(torch.linspace(-1.5, 0.5, heads))
    return intervenable


def adding(model: Any, component: str, vector: Tensor, unit: str = "pos", kind: Any = None, **kwargs: Any) -> Any:
    kind = kind or pyvene.AdditionIntervention
    config = {"layer": 1, "component": component, "unit": unit, "intervention_type": kind, **kwargs}
    return pyvene.IntervenableModel([{**config, "source_representation": vector}], model)


def llama_by_hand(
    model: Any, ids: Tensor, layer: int, heads: list[int], positions: list[int], factors: Tensor
) -> Tensor:
    """Llama's forward pass from its weights alone; at one layer heads are scaled at positions, before W_O."""
    config, n_tokens = model.config, ids.shape[1]
    n_heads, n_kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
    angles = torch.arange(n_tokens).double()[:, None] * torch.cat([frequencies, frequencies])  # [T, D]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def rotated(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-high, low], -1) * angles.sin()

    x = model.model.embed_tokens.weight[ids]
    for number, block in enumerate(model.model.layers):
        attention, h = block.self_attn, norm(x, block.input_layernorm.weight)
        q, k, v = (
            (h @ projection.weight.T).unflatten(-1, (count, width)).transpose(1, 2)
            for projection, count in ((attention.q_proj, n_heads), (attention.k_proj, n_kv), (attention.v_proj, n_kv))
        )
        k, v = (part.repeat_interleave(n_heads // n_kv, 1) for part in (rotated(k), v))
        scores = rotated(q) @ k.transpose(-1, -2) / width**0.5
        scores = scores.masked_fill(torch.ones(n_tokens, n_tokens).triu(1).bool(), float("-inf"))
        z = (scores.softmax(-1) @ v).transpose(1, 2).clone()  # [B, T, H, D]
        if number == layer:
            for head, factor in zip(heads, factors, strict=True):
                z[:, positions, head] *= factor
        x = x + z.flatten(2) @ attention.o_proj.weight.T
        h, mlp = norm(x, block.post_attention_layernorm.weight), block.mlp
        x = x + (F.silu(h @ mlp.gate_proj.weight.T) * (h @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    return norm(x, model.model.norm.weight) @ model.lm_head.weight.T


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("heads", "positions"), [([0], [2]), ([3, 1], [0, 5]), ([2], list(range(6)))])
def test_heads_at_positions_are_scaled_as_in_a_forward_pass_written_by_hand(
    layer: int, heads: list[int], positions: list[int]
) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    factors = torch.tensor([-0.5, 1.75])[: len(heads)].double()
    with torch.no_grad():
        expected = llama_by_hand(model, IDS, layer, heads, positions, factors)
        torch.testing.assert_close(
            model(IDS).logits, llama_by_hand(model, IDS, 0, [], [], factors[:0]), rtol=1e-5, atol=1e-5
        )
    config = {"layer": layer, "component": HEADS, "unit": "h.pos", "max_number_of_units": len(heads)}
    intervenable = pyvene.IntervenableModel([{**config, "intervention_type": ScaleIntervention}], model)
    with torch.no_grad():
        next(iter(intervenable.interventions.values())).alpha.copy_(factors - 1)
    locations = {"sources->base": (None, [[[heads] * 3, [positions] * 3]])}
    torch.testing.assert_close(run(intervenable, unit_locations=locations), expected, rtol=1e-5, atol=1e-5)
    ours = af.ActivScalar.for_model(model, layers=[layer], positions=positions)
    with torch.no_grad():
        for head, factor in zip(heads, factors, strict=True):
            ours.alpha[0, :, head] = factor - 1
    torch.testing.assert_close(patched(model, ours), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "opt", "qwen3"])
def test_an_exported_intervention_computes_what_a_patch_computes_on_both_paths(family: str) -> None:
    model = tiny_model(family)
    for site in SITES:
        for kind in (af.ActivScalar, af.SteerVec):
            intervention = randomised(kind.for_model(model, site=site))
            expected, intervenable = patched(model, intervention, -0.7), to_pyvene(intervention, model, -0.7)
            torch.testing.assert_close(run(intervenable), expected)
            with accelerate(intervenable) as handle:
                torch.testing.assert_close(run(intervenable), expected)
            assert set(handle.paths.values()) == {"fused"}


def test_each_exported_part_acts_at_the_module_that_it_names() -> None:
    model = tiny_model("gemma3_text")
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    first, second = (randomised(af.ActivScalar.for_model(model, site="mlp_out", mlp=norm)) for norm in norms)
    expected = patched(model, first + second)
    assert not torch.allclose(expected, patched(model, first), atol=1e-3)
    torch.testing.assert_close(run(to_pyvene(first + second, model)), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "opt"])
def test_what_pyvene_saves_comes_back_as_it_was(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    intervention = scalars(model) + randomised(af.SteerVec.for_model(model, site="residual", layers=[0]))
    intervenable = to_pyvene(intervention, model)
    intervenable.save(str(tmp_path / "saved"))
    for back in (from_pyvene(intervenable), load_pyvene(tmp_path / "saved", model)):
        assert [type(part) for part in back.singles] == [af.ActivScalar, af.SteerVec]
        for part, original in zip(back.singles, intervention.singles, strict=True):
            assert part.location == original.location
            assert all(torch.equal(a, b) for a, b in zip(part.parameters(), original.parameters(), strict=True))
    if family != "opt":  # pyvene itself loads no family that is not in its tables
        loaded = pyvene.IntervenableModel.load(str(tmp_path / "saved"), model)
        torch.testing.assert_close(run(loaded), patched(model, intervention))


def test_pyvene_trains_the_scalars_of_its_config_and_the_result_is_an_intervention() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")  # pyvene's own path trains under no other; see the next test
    config = {"component": HEADS, "unit": "h", "max_number_of_units": 4, "intervention_type": ScaleIntervention}
    intervenable = pyvene.IntervenableModel([{**config, "layer": layer} for layer in range(2)], model)
    assert intervenable.count_parameters() == 8
    optimizer = torch.optim.SGD(intervenable.get_trainable_parameters(), lr=0.1)
    ours = af.ActivScalar.for_model(model)
    for step in range(3):
        context = accelerate(intervenable) if step else None
        optimizer.zero_grad()
        intervenable(base=BASE)[1].logits.square().mean().backward()
        optimizer.step()
        if context is not None:
            context.remove()
        with af.patch(model, ours):
            ours.alpha.grad = None
            model(IDS).logits.square().mean().backward()
            with torch.no_grad():
                ours.alpha -= 0.1 * ours.alpha.grad
    back = from_pyvene(intervenable)
    torch.testing.assert_close(back.alpha, ours.alpha)
    assert bool((ours.alpha != 0).all())


def test_heads_of_two_layers_train_under_sdpa_on_the_accelerated_path_alone() -> None:
    model = tiny_model("llama")
    intervention = scalars(model)
    intervenable = to_pyvene(intervention, model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        intervenable(base=BASE)[1].logits.square().mean().backward()
    intervenable.zero_grad()
    with accelerate(intervenable):
        intervenable(base=BASE)[1].logits.square().mean().backward()
    with af.patch(model, intervention):
        loss = model(IDS).logits.square().mean()
        loss.backward()
    found = [item.alpha.grad for item in intervenable.interventions.values()]
    torch.testing.assert_close(torch.stack(found), intervention.alpha.grad[:, 0])


def test_pyvenes_own_additions_subtractions_and_zeros_are_read() -> None:
    model = tiny_model("llama")
    vector, other = torch.randn(32), torch.randn(32)
    config = [
        {"layer": 0, "component": "block_output", "intervention_type": pyvene.AdditionIntervention},
        {"layer": 1, "component": "attention_output", "intervention_type": pyvene.SubtractionIntervention},
        {"layer": 1, "component": "block_input", "intervention_type": pyvene.AdditionIntervention},
        {"layer": 1, "component": "attention_value_output", "intervention_type": pyvene.ZeroIntervention},
    ]
    for entry, source in zip(config, (vector, other, other, None), strict=True):
        entry["source_representation"] = source
    intervenable = pyvene.IntervenableModel(config, model)
    back = from_pyvene(intervenable)
    torch.testing.assert_close(patched(model, back), run(intervenable))
    with accelerate(intervenable) as handle:
        torch.testing.assert_close(run(intervenable), patched(model, back))
    assert set(handle.paths.values()) == {"fused"}


def test_what_neither_side_can_say_is_refused_with_the_reason() -> None:
    model = tiny_model("llama")
    with pytest.raises(TypeError, match="got DynScalar, expected ActivScalar or SteerVec"):
        to_pyvene(af.DynScalar.for_model(model), model)
    with pytest.raises(ValueError, match="has positions, expected all"):
        to_pyvene(scalars(model, positions=[0]), model)
    with pytest.raises(ValueError, match="is a stack"):
        to_pyvene(af.ActivScalar.stack([scalars(model), scalars(model)]), model)
    with pytest.raises(ValueError, match="made for another model"):
        to_pyvene(scalars(tiny_model("gpt2")), model)
    with pytest.raises(ValueError, match="scales 2 heads that each call names, expected all 4"):
        from_pyvene(head_scaling(model, 2))
    with pytest.raises(ValueError, match="VanillaIntervention is not one of ScaleIntervention, ZeroIntervention"):
        from_pyvene(pyvene.IntervenableModel([{"layer": 0, "component": "block_output"}], model))
    with pytest.raises(ValueError, match="component 'query_output' is none of the sites"):
        from_pyvene(adding(model, "query_output", torch.ones(32)))
    with pytest.raises(ValueError, match="its source comes with each call"):
        from_pyvene(adding(model, "block_output", None))


def test_heads_that_a_call_names_are_not_taken_for_all_heads(tmp_path: Path) -> None:
    model = tiny_model("llama")
    one = head_scaling(model, 1)
    zeros = pyvene.IntervenableModel(
        [{"layer": 1, "component": HEADS, "unit": "h", "intervention_type": pyvene.ZeroIntervention}], model
    )
    for name, intervenable, reason in (
        ("one", one, "scales 1 heads that each call names, expected all 4"),
        ("zeros", zeros, "zeroes heads that each call names, expected a whole site"),
    ):
        intervenable.save(str(tmp_path / name))
        for read in (lambda i=intervenable: from_pyvene(i), lambda n=name: load_pyvene(tmp_path / n, model)):
            with pytest.raises(ValueError, match=reason):
                read()
    torch.save({"alpha": torch.ones(4)}, tmp_path / "alpha")
    whole = to_pyvene(scalars(model, site="residual", layers=[0]), model)
    whole.save(str(tmp_path / "whole"))
    (file,) = (tmp_path / "whole").glob("*.bin")
    for tensors, reason in (({"alpha": torch.ones(4)}, "has 4 factors, expected one"), ({}, r"no factors \(alpha\)")):
        torch.save(tensors, file)
        with pytest.raises(ValueError, match=reason):
            load_pyvene(tmp_path / "whole", model)


def test_linked_interventions_are_refused_as_the_second_gives_the_first_ones_output(tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = {"component": "block_output", "intervention_type": ScaleIntervention, "intervention_link_key": 0}
    intervenable = pyvene.IntervenableModel([{**config, "layer": layer} for layer in range(2)], model)
    (shared,) = set(intervenable.interventions.values())
    with torch.no_grad():
        shared.alpha.fill_(0.5)
    separate = randomised(af.ActivScalar.for_model(model, site="residual"))
    with torch.no_grad():
        separate.alpha.fill_(0.5)
    assert not torch.allclose(run(intervenable), patched(model, separate), atol=1e-2)
    intervenable.save(str(tmp_path))
    for read in (lambda: from_pyvene(intervenable), lambda: load_pyvene(tmp_path, model)):
        with pytest.raises(ValueError, match=r"layer_0_comp_block_output.*is linked \(intervention_link_key\)"):
            read()


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("place", ["residual", "attn_out"])
def test_of_two_modules_at_one_place_the_one_that_runs_first_acts_first(
    place: str, swapped: bool, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    vector = torch.linspace(-2, 2, 32)
    first, second = {
        "residual": ((0, "block_output"), (1, "block_input")),
        "attn_out": ((1, "model.layers[1].self_attn.o_proj.output"), (1, "attention_output")),
    }[place]
    if swapped:
        first, second = second, first
    config = [
        {"layer": second[0], "component": second[1], "intervention_type": ScaleIntervention},
        {
            "layer": first[0], "component": first[1], "intervention_type": pyvene.AdditionIntervention,
            "source_representation": vector,
        },
    ]  # fmt: skip
    intervenable = pyvene.IntervenableModel(config, model)
    with torch.no_grad():
        intervenable.interventions[intervenable.sorted_keys[0]].alpha.fill_(-0.6)
    intervenable.save(str(tmp_path))
    expected = run(intervenable)
    for back in (from_pyvene(intervenable), load_pyvene(tmp_path, model)):
        torch.testing.assert_close(patched(model, back), expected)
        assert [type(part) for part in back.singles] == (
            [af.ActivScalar, af.SteerVec] if swapped else [af.SteerVec, af.ActivScalar]
        )


def test_the_order_is_pyvenes_own_where_it_sorts_the_config() -> None:
    model = tiny_model("llama")
    config = [
        {"layer": 0, "component": "block_output", "intervention_type": pyvene.AdditionIntervention,
         "source_representation": torch.linspace(-2, 2, 32)},
        {"layer": 0, "component": "block_output", "intervention_type": ScaleIntervention},
    ]  # fmt: skip
    intervenable = pyvene.IntervenableModel(
        config, model, intervenables_sort_fn=lambda model, representations: [*representations][::-1]
    )
    with torch.no_grad():
        intervenable.interventions[intervenable.sorted_keys[0]].alpha.fill_(-0.6)
    torch.testing.assert_close(patched(model, from_pyvene(intervenable)), run(intervenable))


def test_an_addition_to_a_float64_model_keeps_its_digits() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    for kind in (pyvene.AdditionIntervention, pyvene.SubtractionIntervention):
        stock, fast, path = both_paths(adding(model, "block_output", torch.randn(32).double() / 3, kind=kind))
        assert path == "fused"
        torch.testing.assert_close(fast, stock, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("family", ["llama", "mistral"])  # of one heads · head_dim is not the hidden size
def test_what_scaling_cannot_limit_is_refused_on_both_paths(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    intervenable = head_scaling(model, 2)
    (intervention,) = intervenable.interventions.values()
    refused: list[tuple[dict[str, Any], str]] = [({"subspaces": [[[0]] * 3]}, r"subspaces: got \[\[0\]")]
    run(intervenable, unit_locations=at([0, 3]))
    intervenable.save(str(tmp_path / "all"))
    again = pyvene.IntervenableModel.load(str(tmp_path / "all"), model)
    assert torch.equal(run(again, unit_locations=at([0, 3])), run(intervenable, unit_locations=at([0, 3])))
    for n_dims in (None, 5):
        if n_dims:
            intervention.set_interchange_dim(n_dims)
            refused = [({}, "interchange_dim: got 5, expected")]
        for options, reason in refused:
            with pytest.raises(ValueError, match=reason):
                run(intervenable, unit_locations=at([0, 3]), **options)
            with accelerate(intervenable), pytest.raises(ValueError, match=reason):
                run(intervenable, unit_locations=at([0, 3]), **options)
    whole = pyvene.IntervenableModel([{"layer": 0, "component": "block_output",
                                       "intervention_type": ScaleIntervention}], model)  # fmt: skip
    next(iter(whole.interventions.values())).set_interchange_dim(5)
    for call in (lambda: run(whole), lambda: from_pyvene(whole)):
        with pytest.raises(ValueError, match="5"):
            call()


def test_a_damaged_folder_says_what_is_wrong_and_runs_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama")
    to_pyvene(scalars(model), model).save(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = next(tmp_path.glob("*.bin"))
    torch.save({"alpha": nn.Linear(1, 1)}, tensors)  # an object, not a tensor
    with pytest.raises(ValueError, match="damaged, or more than tensors"):
        load_pyvene(tmp_path, model)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected it beside config\.json"):
        load_pyvene(tmp_path, model)
    config["intervention_types"][0] = "<class 'os.path.Thing'>"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is <class 'os\.path\.Thing'>, expected one of"):
        load_pyvene(tmp_path, model)
    to_pyvene(scalars(model, layers=[0]), model).save(str(tmp_path / "place"))
    (file,), place = (tmp_path / "place").glob("*.bin"), tmp_path / "place" / "config.json"
    saved = place.read_text()
    for old, new, reason in (
        ("0,", "99,", "layer_99_.*no component 'head_attention_value_output' of layer 99"),
        (f'"{HEADS}"', '"nothing"', "no component 'nothing' of layer 0"),
        (f'"{HEADS}"', '"model.layers[0].mlp"', r"no component 'model\.layers\[0\]\.mlp'"),
    ):
        changed = json.loads(saved)
        text = json.dumps(changed["representations"]).replace(old, new, 1)
        changed["representations"] = json.loads(text)
        place.write_text(json.dumps(changed))
        representation = pyvene.RepresentationConfig(*changed["representations"][0])
        counter = SimpleNamespace(_key_collision_counter={})
        key = pyvene.IntervenableModel._get_representation_key(counter, representation)
        file = file.rename(tmp_path / "place" / f"intkey_{key}.bin")
        with pytest.raises(ValueError, match=reason):
            load_pyvene(tmp_path / "place", model)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged or not a pyvene config"):
        load_pyvene(tmp_path, model)
    with pytest.raises(FileNotFoundError, match="expected a folder written by pyvene"):
        load_pyvene(tmp_path / "none", model)


def both_paths(intervenable: Any, **kwargs: Any) -> tuple[Tensor, Tensor, str]:
    """(logits of pyvene's own path, of the accelerated one, which path served the only intervention)."""
    stock = run(intervenable, **kwargs)
    with accelerate(intervenable) as handle:
        fast = run(intervenable, **kwargs)
    (path,) = handle.paths.values()
    return stock, fast, path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [[0], [2], [1, 2], [3, 0], [0, 1, 2], [0, 1, 2, 3]])
def test_any_heads_at_all_positions_take_the_fast_path_with_equal_results(heads: list[int], dtype: torch.dtype) -> None:
    for family in ("llama", "gpt2"):
        model = tiny_model(family, dtype=dtype)
        before = model(IDS).logits
        vector = torch.linspace(-1, 1, 8).to(dtype)
        zeros = pyvene.IntervenableModel(
            [{"layer": 1, "component": HEADS, "unit": "h", "intervention_type": pyvene.ZeroIntervention}], model
        )
        for intervenable in (head_scaling(model, len(heads)), adding(model, HEADS, vector, "h"), zeros):
            stock, fast, path = both_paths(intervenable, unit_locations=at(heads))
            assert path == "fused"
            assert torch.equal(fast, stock)
            assert not torch.equal(fast, before)


def test_gradients_of_both_paths_are_equal() -> None:
    model = tiny_model("llama")
    for heads in ([1], [3, 0], [0, 1, 2, 3]):
        intervenable = head_scaling(model, len(heads), layer=0)
        (intervention,) = intervenable.interventions.values()
        gradients = []
        for fast in (False, True):
            handle = accelerate(intervenable) if fast else None
            intervention.alpha.grad = None
            intervenable(base=BASE, unit_locations=at(heads))[1].logits.square().mean().backward()
            gradients.append(intervention.alpha.grad)
            if handle is not None:
                handle.remove()
        torch.testing.assert_close(gradients[1], gradients[0])
        assert float(gradients[0].abs().min()) > 0


def test_additions_limited_to_some_dimensions_stay_limited() -> None:
    model = tiny_model("llama")
    for kind in (pyvene.AdditionIntervention, pyvene.SubtractionIntervention, pyvene.ZeroIntervention):
        intervenable = adding(model, "block_output", torch.randn(32), kind=kind)
        (intervention,) = intervenable.interventions.values()
        intervention.set_interchange_dim(5)
        stock, fast, path = both_paths(intervenable)
        assert path == "fused"
        assert torch.equal(fast, stock)


def whole_site(model: Any, component: str, width: int) -> list[Any]:
    """Every covered kind at all positions of a component."""
    scaling, vector = ScaleIntervention(), torch.linspace(-1, 1, width)
    with torch.no_grad():
        scaling.alpha.fill_(-1.7)  # of a factor that a norm follows only the sign gets through
    made = [
        scaling,
        pyvene.AdditionIntervention(embed_dim=width, source_representation=vector),
        pyvene.SubtractionIntervention(embed_dim=width - 3, source_representation=vector),
        pyvene.ZeroIntervention(embed_dim=width - 3),
    ]
    return [pyvene.IntervenableModel([{"component": component, "intervention": item}], model) for item in made]


@pytest.mark.parametrize(
    ("component", "width"),
    [("model.layers[1].self_attn.q_norm.output", 10), ("model.layers[1].self_attn.k_norm.input", 10),
     ("model.output", 32)],
)  # fmt: skip
def test_whole_sites_of_four_dimensions_and_in_a_dict_take_the_fast_path_too(component: str, width: int) -> None:
    model = tiny_model("qwen3")
    with torch.no_grad():
        before = model(IDS).logits
    for intervenable in whole_site(model, component, width):
        stock, fast, path = both_paths(intervenable)
        assert path == "fused"
        assert torch.equal(fast, stock)
        assert not torch.allclose(fast, before, atol=1e-2)
        with torch.no_grad(), accelerate(intervenable):
            whole = intervenable(base=BASE, output_original_output=True)
        assert torch.equal(whole[0].logits, before)


def test_positions_of_a_norm_a_head_are_scaled_and_its_heads_refused() -> None:
    """Of [B, T, H, D], which pyvene does not split by heads, unit "h" would mean tokens."""
    model, component = tiny_model("qwen3"), "model.layers[1].self_attn.q_norm.output"
    scaling = whole_site(model, component, 10)[0]
    seen: list[Tensor] = []
    handle = model.model.layers[1].self_attn.q_norm.register_forward_hook(lambda m, a, y: seen.append(y.clone()))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    expected = seen[0].clone()
    expected[:, [1, 4]] *= -0.7
    forward = model.model.layers[1].self_attn.q_norm.forward
    model.model.layers[1].self_attn.q_norm.forward = lambda x: expected
    with torch.no_grad():
        logits = model(IDS).logits
    model.model.layers[1].self_attn.q_norm.forward = forward
    torch.testing.assert_close(run(scaling, unit_locations={"base": [[[1, 4]] * 3]}), logits)
    item = ScaleIntervention(unit="h", max_number_of_units=4)
    config = {"component": component, "unit": "h", "max_number_of_units": 4, "intervention": item}
    by_head = pyvene.IntervenableModel([config], model)
    with pytest.raises(ValueError, match=r"got shape \(3, 6, 4, 10\), expected \(B, 4, T, D\)"):
        run(by_head)
    with accelerate(by_head), pytest.raises(ValueError, match=r"expected \(B, 4, T, D\), split by heads"):
        run(by_head)
    with pytest.raises(ValueError, match=r"got shape \(3, 3, 6, 8\), expected \(B, 2, T, D\)"):
        run(head_scaling(tiny_model("llama"), 2), unit_locations=at([0, 1, 2]))


def test_a_patch_that_is_on_ends_with_pyvenes_next_call_until_it_is_applied_again() -> None:
    """pyvene takes the hooks off; removal leaves the model whole."""
    for site in SITES:
        model = tiny_model("llama")
        intervention, other = scalars(model, site=site), adding(model, "block_output", torch.zeros(32))
        with torch.no_grad():
            plain = model(IDS).logits
        with af.patch(model, intervention), torch.no_grad():
            assert not torch.equal(model(IDS).logits, plain)
            for result in both_paths(other)[:2]:
                assert torch.equal(result, plain)
            assert torch.equal(model(IDS).logits, plain)
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        assert not torch.equal(patched(model, intervention), plain)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, plain)


def test_what_is_not_covered_keeps_pyvenes_path_and_the_handle_says_so() -> None:
    model = tiny_model("llama")
    scaling, vector = head_scaling(model, 2), adding(model, "block_output", torch.randn(32))
    calls: list[tuple[Any, dict[str, Any], str]] = [
        (scaling, {"unit_locations": {"sources->base": (None, [[[0, 1], [1, 2], [0, 1]]])}}, "other heads in each row"),
        (vector, {"unit_locations": {"base": [0, 2]}}, "positions in the call (unit 'pos')"),
        (vector, {"subspaces": [[[0]] * 3]}, "subspaces or further arguments in the call"),
    ]
    rotation = pyvene.IntervenableModel([{"layer": 0, "component": "block_output"}], model)
    with torch.no_grad():
        hidden = model(IDS.flip(0), output_hidden_states=True).hidden_states[1]
    calls.append((rotation, {"source_representations": hidden}, "VanillaIntervention is not one of ScaleIntervention"))
    source = adding(model, "block_output", None)
    calls.append((source, {"source_representations": hidden}, "its source comes with the call"))
    for intervenable, options, reason in calls:
        stock, fast, path = both_paths(intervenable, **options)
        assert path.startswith(reason)
        assert torch.equal(fast, stock)


def test_generation_is_the_same_on_both_paths_and_as_under_a_patch() -> None:
    model = tiny_model("llama")
    intervention = scalars(model)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with af.patch(model, intervention):
        expected = model.generate(IDS, **options)
    intervenable = to_pyvene(intervention, model)
    assert torch.equal(intervenable.generate(BASE, intervene_on_prompt=True, **options)[1], expected)
    with accelerate(intervenable):
        assert torch.equal(intervenable.generate(BASE, intervene_on_prompt=True, **options)[1], expected)
    heads = head_scaling(model, 2)
    stock = heads.generate(BASE, unit_locations=at([0, 1]), **options)[1]
    with accelerate(heads) as handle:
        assert torch.equal(heads.generate(BASE, unit_locations=at([0, 1]), **options)[1], stock)
    assert "heads in a call of generate()" in next(iter(handle.paths.values()))


def test_the_handle_comes_off_once_twice_and_after_an_error() -> None:
    model = tiny_model("llama")
    intervenable, other = head_scaling(model, 4), head_scaling(model, 4)
    handle = accelerate(intervenable)
    assert "_intervention_setter" not in other.__dict__
    with pytest.raises(ValueError, match="intervenable: is accelerated already"):
        accelerate(intervenable)
    handle.remove()
    handle.remove()
    assert "_intervention_setter" not in intervenable.__dict__
    with pytest.raises(IndexError), accelerate(intervenable):
        intervenable(base={"input_ids": IDS + 1000})
    assert "_intervention_setter" not in intervenable.__dict__
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(TypeError, match="intervenable: got LlamaForCausalLM, expected"):
        accelerate(model)


@pytest.mark.real_model
def test_the_real_model_agrees_on_both_paths_and_under_a_patch(demo_model: tuple[Any, Any]) -> None:
    model, tokenizer = demo_model
    ids = tokenizer("The capital of Germany is Paris. Q: What is the capital of Germany? A:", return_tensors="pt")
    intervention = randomised(af.ActivScalar.for_model(model), scale=0.2)
    with torch.no_grad(), af.patch(model, intervention):
        expected = model(**ids).logits
    intervenable = to_pyvene(intervention, model)
    with torch.no_grad():
        assert torch.equal(intervenable(base=ids)[1].logits, expected)
        with accelerate(intervenable):
            assert torch.equal(intervenable(base=ids)[1].logits, expected)
