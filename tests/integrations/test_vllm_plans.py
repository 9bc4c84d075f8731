"""The arithmetic of the vLLM plug-in, without vLLM: options, the folder, plans, the table and the rows of runners."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from model_zoo import tiny_model
from tiny import llama

import actscale_fast as af
from actscale_fast.architectures.layout import layout
from actscale_fast.integrations._token_rows import steer_heads
from actscale_fast.integrations.vllm import admission, runner_v1, runner_v2
from actscale_fast.integrations.vllm.plan import Plan, Row
from actscale_fast.integrations.vllm.registry import Registry, require_served
from actscale_fast.integrations.vllm.request_options import RequestOptions, Where, parse
from actscale_fast.integrations.vllm.resolve import resolve
from actscale_fast.integrations.vllm.served_model import KEY, ServedModel
from actscale_fast.integrations.vllm.settings import SERVED_KINDS, Settings
from actscale_fast.integrations.vllm.worker_table import Span, WorkerTable
from actscale_fast.interventions import Intervention
from actscale_fast.interventions.named import remove_named


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def served(model: Any) -> ServedModel:
    found = layout(model).fingerprint
    return ServedModel(
        "tiny",
        (found.model_type,),
        found.n_layers,
        found.n_heads,
        found.head_dim,
        found.hidden_size,
        SERVED_KINDS,
        8,
        "x",
    )


def random(model: Any, kind: str = "ActivScalar", seed: int = 0, **where: Any) -> Intervention:
    made: Intervention = getattr(af, kind).for_model(model, **where)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def plan_of(served: ServedModel, *found: Intervention, length: int = 6, where: Where | None = None, **kw: Any) -> Plan:
    names = tuple(f"n{number}" for number in range(len(found)))
    strengths = kw.get("strengths", (1.0,) * len(found))
    options = RequestOptions(names, strengths, *([where] if where else []))
    plan = resolve(options, found, length, served)
    assert plan is not None
    return plan


# Options


def test_options_are_read() -> None:
    assert parse(None) is None
    assert parse({"other": 1}) is None
    assert parse({"actscale": "a"}) == RequestOptions(("a",), (1.0,))
    assert parse({"actscale": "a + b", "actscale_strength": [1, -2.5]}) == RequestOptions(("a", "b"), (1.0, -2.5))
    asked = parse({"actscale": ["a"], "actscale_where": [0, -1, "generated"]})
    assert asked is not None
    assert asked.where == Where(False, True, (0, -1))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"actscale_strenght": 1.0}, "did you mean 'actscale_strength'"),
        ({"actscale-strength": 1.0}, "unknown, expected actscale"),
        ({"actscale_strength": 1.0}, "missing, expected the name"),
        ({"actscale": "a", "actscale_plan": {}}, "reserved for the server"),
        ({"actscale": "a++b"}, "holds an empty name"),
        ({"actscale": ""}, "holds an empty name"),
        ({"actscale": 3}, "expected a name"),
        ({"actscale": {"a": 1}}, "expected a name"),
        ({"actscale": ["a"] * 65}, "got 65 names, expected at most 64"),
        ({"actscale": "a", "actscale_strength": "1"}, "expected a number"),
        ({"actscale": "a", "actscale_strength": True}, "expected a number"),
        ({"actscale": "a", "actscale_strength": float("nan")}, "expected a finite number"),
        ({"actscale": "a", "actscale_strength": float("inf")}, "expected a finite number"),
        ({"actscale": "a", "actscale_strength": 10**40}, r"expected a finite number, 1e\+30 at most"),
        ({"actscale": "a", "actscale_strength": -(10**400)}, "expected a finite number"),
        ({"actscale": "a+b", "actscale_strength": [1.0]}, "1 numbers for 2 names"),
        ({"actscale": "a", "actscale_where": "promt"}, "did you mean 'prompt'"),
        ({"actscale": "a", "actscale_where": []}, "a list of prompt positions"),
        ({"actscale": "a", "actscale_where": 3}, "a list of prompt positions"),
        ({"actscale": "a", "actscale_where": [0.5]}, "expected whole numbers"),
        ({"actscale": "a", "actscale_where": [1, 1]}, "twice"),
    ],
)
def test_options_that_cannot_be_are_refused(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(extra)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACTSCALE_KINDS": "ActivScaler"}, "did you mean 'ActivScalar'"),
        ({"ACTSCALE_ROWS_PER_REQUEST": "0"}, "a number from 1"),
        ({"ACTSCALE_ROWS_PER_REQUEST": "x"}, "a number from 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(environment: dict[str, str], message: str) -> None:
    assert Settings.from_environment(environment) is None  # without a folder, nothing is configured
    with pytest.raises(ValueError, match=message):
        Settings.from_environment({**environment, "ACTSCALE_INTERVENTIONS": "x"})


# The folder


def test_the_folder_is_the_truth(model: Any, served: ServedModel, tmp_path: Path) -> None:
    registry = Registry(tmp_path, served)
    assert registry.names() == []
    random(model, seed=1).save_pretrained(tmp_path / "capitals")
    random(model, seed=1).save_pretrained(tmp_path / ".half-written")
    (tmp_path / "notes").mkdir()
    first = registry.get("capitals")
    assert registry.names() == ["capitals"]
    assert registry.get("capitals") is first
    random(model, seed=2).save_pretrained(tmp_path / "capitals")
    assert registry.get("capitals").sha256 != first.sha256
    for path in (tmp_path / "capitals").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="got 'capitals', loaded are: none"):
        registry.get("capitals")


def test_a_saved_intervention_is_a_folder_of_one(model: Any, served: ServedModel, tmp_path: Path) -> None:
    random(model).save_pretrained(tmp_path / "capitals")
    registry = Registry(tmp_path / "capitals", served)
    assert registry.names() == ["capitals"]
    assert registry.get("capitals").kinds == ("ActivScalar",)
    with pytest.raises(ValueError, match="got 'capital', loaded are: capitals; did you mean 'capitals'"):
        registry.get("capital")


@pytest.mark.parametrize("name", ["../x", "", ".", "a/b", "\0", "x" * 200, "a\\b"])
def test_a_name_never_leads_out_of_the_folder(name: str, model: Any, served: ServedModel, tmp_path: Path) -> None:
    random(model).save_pretrained(tmp_path / "x")
    (tmp_path / "inside").mkdir()
    with pytest.raises(ValueError, match="loaded are"):
        Registry(tmp_path / "inside", served).get(name)


def test_a_folder_whose_name_no_request_can_use_is_refused(model: Any, served: ServedModel, tmp_path: Path) -> None:
    random(model).save_pretrained(tmp_path / "a+b")
    with pytest.raises(ValueError, match="cannot be used in a request"):
        Registry(tmp_path, served).check_names()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda model: random(model, site="attn_out"),
            "an ActivScalar at the site 'attn_out' cannot be served, expected 'head'; merge",
        ),
        (
            lambda model: random(model, "SteerVec", site="residual", layers=[0]),
            "a SteerVec at the site 'residual' cannot be served, expected 'head' or 'attn_out'; merge",
        ),
        (lambda model: random(model, site="residual", layers=[0]), "at the site 'residual' cannot be served"),
        (lambda model: af.Projection.for_model(model, site="residual"), "a Projection cannot be served"),
        (lambda model: random(model) + random(model, site="mlp_out"), "at the site 'mlp_out' cannot be served"),
        (lambda model: af.stack([random(model), random(model)]), "a stack of 2"),
        (lambda model: random(llama(layers=2)), "made for another model"),
    ],
)
def test_what_the_table_cannot_hold_is_refused_with_the_reason(
    make: Any, message: str, model: Any, served: ServedModel, tmp_path: Path
) -> None:
    make(model).save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        Registry(tmp_path, served).get("x")


def test_a_kind_without_room_names_the_setting(model: Any, served: ServedModel, tmp_path: Path) -> None:
    random(model, "SteerVec").save_pretrained(tmp_path / "v")
    small = ServedModel(**{**served.__dict__, "kinds": ("ActivScalar",)})
    with pytest.raises(ValueError, match="ACTSCALE_KINDS=ActivScalar,SteerVec"):
        Registry(tmp_path, small).get("v")
    random(model, "SteerVec", site="attn_out").save_pretrained(tmp_path / "o")
    with pytest.raises(ValueError, match=r"SteerVec:attn_out needs room.*ACTSCALE_KINDS=ActivScalar,SteerVec:attn_out"):
        Registry(tmp_path, small).get("o")
    assert Settings.from_environment(
        {"ACTSCALE_INTERVENTIONS": "x", "ACTSCALE_KINDS": "SteerVec:attn_out, ActivScalar"}
    ) == Settings(Path("x"), ("ActivScalar", "SteerVec:attn_out"))


def test_a_damaged_file_is_refused(model: Any, served: ServedModel, tmp_path: Path) -> None:
    random(model).save_pretrained(tmp_path / "x")
    tensors = next((tmp_path / "x").glob("*.safetensors"))
    raw = bytearray(tensors.read_bytes())
    raw[-1] ^= 1
    tensors.write_bytes(raw)
    with pytest.raises(ValueError, match=tensors.name):
        Registry(tmp_path, served).get("x")


# Plans


def test_one_intervention_for_all_tokens_is_one_row(model: Any, served: ServedModel) -> None:
    scalars = random(model)
    plan = plan_of(served, scalars, strengths=(-0.5,))
    assert (plan.prompt, plan.generated, dict(plan.special)) == (0, 0, {})
    np.testing.assert_array_equal(plan.rows[0].alpha, (-0.5 * scalars.alpha[:, 0]).detach().numpy())


def test_interventions_are_folded_in_their_order(model: Any, served: ServedModel) -> None:
    a, v, b, d = random(model), random(model, "SteerVec", 1), random(model, seed=2), random(model, "DynScalar", 3)
    row = plan_of(served, a, v, b, d, strengths=(1.0, 0.5, -0.25, 2.0)).rows[0]
    shape = (served.n_heads, served.head_dim)
    x = torch.randn(5, shape[0] * shape[1], generator=torch.Generator().manual_seed(4))
    for layer in range(served.n_layers):
        expected = x
        for part, strength in ((a, 1.0), (v, 0.5), (b, -0.25), (d, 2.0)):
            heads = expected.view(1, 5, *shape)
            expected = part.edit(heads, layer, strength, af.interventions.placement.EVERYWHERE).view(5, -1)
        table = {
            "alpha": torch.from_numpy(row.alpha)[layer][None, None],
            "shift": torch.from_numpy(row.shift)[layer][None, None],
            "probes": torch.from_numpy(row.probes)[layer][None],
        }
        got = steer_heads(x, torch.zeros(5, dtype=torch.int64), n_heads=shape[0], **table)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_vectors_at_the_output_are_added_up_whatever_surrounds_them(model: Any, served: ServedModel) -> None:
    first, second = (random(model, "SteerVec", seed, site="attn_out") for seed in (1, 2))
    a, d = random(model), random(model, "DynScalar", 3)
    plan = plan_of(served, first, a, d, second, strengths=(0.5, 1.0, 1.0, -2.0))
    expected = (0.5 * first.vectors - 2.0 * second.vectors)[:, 0, 0].detach().numpy()
    np.testing.assert_allclose(plan.rows[0].output, expected, rtol=1e-6)
    np.testing.assert_array_equal(plan.rows[0].alpha, a.alpha[:, 0].detach().numpy())
    assert plan.rows[0].kinds == {"ActivScalar", "DynScalar", "SteerVec:attn_out"}
    assert plan.salt != plan_of(served, first, a, d).salt


def test_rows_of_a_plan_may_differ_in_their_parts(model: Any, served: ServedModel) -> None:
    a = random(model)
    for other in (
        random(model, "SteerVec", positions=[0]),
        random(model, "DynScalar", positions=[0]),
        random(model, "SteerVec", site="attn_out", positions=[0]),
    ):
        plan = plan_of(served, a, other)
        assert len(plan.rows) == 2
        again = Plan.decode(plan.encoded())
        assert (again.salt, [row.key for row in again.rows]) == (plan.salt, [row.key for row in plan.rows])


def test_nothing_follows_a_dynamic_scalar(model: Any, served: ServedModel) -> None:
    with pytest.raises(ValueError, match="a DynScalar is followed by 'n1'"):
        plan_of(served, random(model, "DynScalar"), random(model))


def test_positions_count_from_both_ends_and_do_nothing_outside(model: Any, served: ServedModel) -> None:
    saved = random(model, positions=[0, -1, 50], generated=True)
    plan = plan_of(served, saved, length=4)
    assert plan.row_numbers(0, 7).tolist() == [1, -1, -1, 2, 0, 0, 0]
    assert plan.row_numbers(3, 2).tolist() == [2, 0]
    for row, slot in ((1, 0), (2, 1), (0, 3)):
        np.testing.assert_array_equal(plan.rows[row].alpha, saved.alpha[:, slot].detach().numpy())
    single = plan_of(served, saved, length=1)  # both positions are the one token: the first listed counts
    np.testing.assert_array_equal(single.rows[single.special[0]].alpha, saved.alpha[:, 0].detach().numpy())


def test_requests_choose_tokens(model: Any, served: ServedModel) -> None:
    def numbers(where: Where) -> list[int]:
        return plan_of(served, random(model), length=3, where=where).row_numbers(0, 5).tolist()

    assert numbers(Where(generated=False)) == [0, 0, 0, -1, -1]
    assert numbers(Where(prompt=False)) == [-1, -1, -1, 0, 0]
    assert numbers(Where(False, False, (-1,))) == [-1, -1, 0, -1, -1]
    assert numbers(Where(False, True, (0,))) == [0, -1, -1, 0, 0]


def test_positions_of_a_request_must_fit(model: Any, served: ServedModel) -> None:
    with pytest.raises(ValueError, match="position 3 for a prompt of 3 tokens, expected -3 to 2"):
        plan_of(served, random(model), length=3, where=Where(False, False, (3,)))
    with pytest.raises(ValueError, match="saved with positions of its own"):
        plan_of(served, random(model, positions=[0]), where=Where(generated=False))


def test_a_strength_that_overflows_is_refused(model: Any, served: ServedModel) -> None:
    with pytest.raises(ValueError, match="infinite in float32"):
        plan_of(served, random(model), random(model, seed=1), strengths=(1e25, 1e25))


def test_more_rows_than_the_table_has_for_a_request_are_refused(model: Any, served: ServedModel) -> None:
    many = random(model, positions=list(range(9)))
    with pytest.raises(ValueError, match=r"needs 9 rows.*ACTSCALE_ROWS_PER_REQUEST"):
        plan_of(served, many, length=20)


def test_what_changes_nothing_has_no_plan(model: Any, served: ServedModel) -> None:
    assert resolve(RequestOptions(("a",), (0.0,)), [random(model)], 4, served) is None
    assert resolve(RequestOptions(("a",), (1.0,)), [af.ActivScalar.for_model(model)], 4, served) is None


def test_salts_differ_where_keys_and_values_may(model: Any, served: ServedModel) -> None:
    a, b = random(model), random(model, seed=1)
    plans = [
        plan_of(served, a), plan_of(served, b), plan_of(served, a, strengths=(0.5,)), plan_of(served, a, b),
        plan_of(served, a, where=Where(generated=False)), plan_of(served, a, where=Where(prompt=False)),
        plan_of(served, a, where=Where(prompt=False), length=7), plan_of(served, a, where=Where(False, False, (0,))),
        plan_of(served, a, where=Where(False, False, (1,))),
    ]  # fmt: skip
    assert len({plan.salt for plan in plans}) == len(plans)
    assert plan_of(served, a, length=3).salt == plan_of(served, a, length=30).salt  # steered everywhere
    assert admission.salted("x", plans[0]) != admission.salted("y", plans[0]) != admission.salted(None, plans[0])
    assert len(admission.salted("x" * 128, plans[0])) <= 128


def test_a_plan_survives_its_journey(model: Any, served: ServedModel) -> None:
    plan = plan_of(served, random(model, "SteerVec", positions=[0, 2], generated=True), random(model))
    again = Plan.decode(plan.encoded())
    assert (again.salt, dict(again.special)) == (plan.salt, dict(plan.special))
    assert again.row_numbers(0, 9).tolist() == plan.row_numbers(0, 9).tolist()
    for data in (
        {},
        {**plan.encoded(), "format": 0},
        {**plan.encoded(), "prompt": 99},
        {**plan.encoded(), "shape": [1, 2, 3]},
    ):
        with pytest.raises(ValueError, match="actscale_plan: damaged"):
            Plan.decode(data)


# Admission


def request(extra: dict[str, Any] | None, length: int = 5, salt: str | None = None) -> Any:
    params = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(
        request_id="r", sampling_params=params, prompt_token_ids=[1] * length, prompt_embeds=None, cache_salt=salt
    )


def test_admission_attaches_a_plan_and_a_salt(model: Any, served: ServedModel, tmp_path: Path) -> None:
    random(model).save_pretrained(tmp_path / "a")
    gate = admission.Admission(Registry(tmp_path, served), served)
    plain, other = request(None), request({"kv_cache_report_mode": "x"})
    for one in (plain, other):
        gate.admit(one)
        assert one.cache_salt is None
        admission.require_plan(one)
    asked = {"actscale": "a", "other": 1}
    steered = request(asked)
    with pytest.raises(ValueError, match="did not pass"):
        admission.require_plan(steered)
    gate.admit(steered)
    admission.require_plan(steered)
    assert asked == {"actscale": "a", "other": 1}  # the caller's own is left alone
    assert steered.sampling_params.extra_args["other"] == 1
    assert steered.cache_salt
    assert Plan.decode(steered.sampling_params.extra_args["actscale_plan"]).prompt_length == 5
    idle = request({"actscale": "a", "actscale_strength": 0.0})
    gate.admit(idle)
    assert (idle.sampling_params.extra_args, idle.cache_salt) == (None, None)
    assert gate.n_steered == 1
    with pytest.raises(ValueError, match="in pieces"):
        gate.admit(request({"actscale": "a"}), resumable=True)


def test_the_reason_of_a_refusal_does_not_tell_where_the_folder_is(
    model: Any, served: ServedModel, tmp_path: Path
) -> None:
    gate = admission.Admission(Registry(tmp_path, served), served)
    random(llama(layers=2)).save_pretrained(tmp_path / "foreign")
    random(model).save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "intervention.json").write_text("{")
    for name, reason in (("foreign", "made for another model"), ("damaged", "damaged/intervention.json: ")):
        with pytest.raises(ValueError, match=f"^actscale: {name}.*") as refused:
            gate.admit(request({"actscale": name}))
        assert reason in str(refused.value)
        assert str(tmp_path) not in str(refused.value)


def test_a_removed_intervention_is_not_kept_in_memory(model: Any, served: ServedModel, tmp_path: Path) -> None:
    registry = Registry(tmp_path, served)
    for name in "abc":
        random(model).save_pretrained(tmp_path / name)
        registry.get(name)
        remove_named(tmp_path, name)
    assert list(registry._entries) == ["c"]


def test_what_is_kept_does_not_grow_with_what_came_and_went(model: Any, served: ServedModel, tmp_path: Path) -> None:
    registry = Registry(tmp_path, served)
    gate, table, cache = admission.Admission(registry, served), table_for(served), runner_v1.PlanCache()
    names = ("a", "b", "c")
    for number in range(120):
        name = names[number % len(names)] if number % 2 else f"once-{number}"
        random(model, seed=number).save_pretrained(tmp_path / name)
        one = request({"actscale": name, "actscale_strength": number + 1.0})
        gate.admit(one)
        for _ in range(2):
            plans = cache.of({f"r{number}": one.sampling_params})
            table.assign([Span(plan, 0, 5) for plan in plans.values()])
        with pytest.raises(ValueError, match="loaded are"):
            gate.admit(request({"actscale": f"unknown-{number}"}))
        if number % 3:
            remove_named(tmp_path, name)
    assert set(registry._entries) <= {*registry.names(), name}
    assert len(cache._plans) == 1
    assert len(table._row_of) == table.n_rows - 1
    assert table.n_written == 120
    assert not table._free


def test_what_changed_is_read_in_another_thread(
    model: Any, served: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, threads = Registry(tmp_path, served), []
    read = Registry._read

    def noted(self: Registry, *args: Any) -> Any:
        threads.append(threading.current_thread())
        return read(self, *args)

    monkeypatch.setattr(Registry, "_read", noted)
    random(model, seed=1).save_pretrained(tmp_path / "a")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "intervention.json").write_text("{")
    for _ in range(2):
        asyncio.run(registry.prepare(["a", "broken", "unknown", "../a"]))
    assert threading.main_thread() not in threads
    assert len(threads) == 2  # what is broken is not read again either
    registry.get("a")
    with pytest.raises(ValueError, match=r"broken/intervention\.json"):
        registry.get("broken")
    assert len(threads) == 2


def test_what_was_refused_is_read_again_when_it_has_changed(model: Any, served: ServedModel, tmp_path: Path) -> None:
    registry = Registry(tmp_path, served)
    random(model).save_pretrained(tmp_path / "x")
    tensors = next((tmp_path / "x").glob("*.safetensors"))
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1])
    for _ in range(2):
        with pytest.raises(ValueError, match=tensors.name):
            registry.get("x")
    tensors.write_bytes(whole)  # the description stays as it was
    assert registry.get("x").name == "x"
    assert registry._refused == {}
    (tmp_path / "x" / "intervention.json").write_text("{")
    with pytest.raises(ValueError, match=r"x/intervention\.json"):
        registry.get("x")
    remove_named(tmp_path, "x")
    random(model).save_pretrained(tmp_path / "y")
    registry.get("y")
    assert registry._refused == {}


def test_the_configuration_carries_what_is_served(served: ServedModel) -> None:
    assert ServedModel.of_config(SimpleNamespace(additional_config={KEY: served.to_dict()})) == served
    assert ServedModel.of_config(SimpleNamespace(additional_config={})) is None


# The table and the runners


def plain_row(served: ServedModel, value: float) -> Row:
    return Row(np.full((served.n_layers, served.n_heads), value, dtype=np.float32))


def table_for(served: ServedModel, **changes: Any) -> WorkerTable:
    sizes = {"max_requests": 2, "max_tokens": 16, "device": torch.device("cpu"), **changes}
    return WorkerTable(ServedModel(**{**served.__dict__, "rows_per_request": 1}), range(served.n_heads), **sizes)


def test_the_table_holds_the_rows_of_running_requests(served: ServedModel) -> None:
    table = table_for(served)
    plans = [Plan((plain_row(served, number),), 0, 0, {}, 3) for number in (1.0, 2.0, 3.0)]

    def values() -> list[float]:
        return table.alpha[0, table.index, 0, 0].tolist()

    table.assign([Span(plans[0], 0, 3), Span(None, 0, 2), Span(plans[1], 7, 1)])
    assert values()[:8] == [1, 1, 1, 0, 0, 2, 0, 0]
    table.assign([Span(plans[1], 8, 1), Span(plans[2], 0, 2)])  # the first has gone: its row is taken
    assert values()[:4] == [2, 3, 3, 0]
    assert table.status()["rows_written"] == 3
    table.assign([Span(plans[2], 2, 1), Span(plans[1], 9, 1)])
    assert table.status()["rows_written"] == 3
    table.assign([Span(None, 0, 4)])
    assert not table.index.any()
    assert not table.alpha[:, 0].any()


def test_the_table_holds_vectors_of_the_whole_output(model: Any, served: ServedModel) -> None:
    table = table_for(served)
    layers = [table.output_layer(number) for number in range(served.n_layers)]
    plan = plan_of(served, random(model, "SteerVec", site="attn_out"))
    plain = Plan((plain_row(served, 1.0),), 0, 0, {}, 3)
    x = torch.randn(5, served.hidden_size, generator=torch.Generator().manual_seed(0))
    table.assign([Span(None, 0, 2), Span(plan, 4, 1), Span(plain, 0, 2)])
    for number, layer in enumerate(layers):
        assert layer is not None
        expected = x.clone()
        expected[2] += torch.from_numpy(plan.rows[0].output)[number]
        assert torch.equal(layer(x), expected)
    layers[1].output = layers[1].output.clone()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="the buffers of layer 1 were replaced"):
        table.assign([Span(plain, 0, 3)])
    without = ServedModel(**{**served.__dict__, "kinds": ("ActivScalar",)})
    small = WorkerTable(without, range(served.n_heads), max_requests=1, max_tokens=4, device=torch.device("cpu"))
    assert small.output_layer(0) is None
    with pytest.raises(ValueError, match="it holds SteerVec:attn_out, for which the table has no room"):
        small.assign([Span(plan, 0, 1)])


def test_a_row_that_could_not_be_written_is_not_used(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars_only = ServedModel(**{**served.__dict__, "kinds": ("ActivScalar",), "rows_per_request": 1})
    table = WorkerTable(scalars_only, range(served.n_heads), max_requests=2, max_tokens=8, device=torch.device("cpu"))
    first, second = (Plan((plain_row(served, value),), 0, 0, {}, 3) for value in (1.0, 2.0))
    table.assign([Span(first, 0, 1)])
    shift = np.ones((served.n_layers, served.n_heads, served.head_dim), dtype=np.float32)
    for row, message in (
        (Row(first.rows[0].alpha, shift), "holds SteerVec, for which the table has no room"),
        (Row(first.rows[0].alpha[:, :1]), "alpha has the shape"),
    ):
        wrong = Plan((row,), 0, 0, {}, 3)
        for _ in range(2):  # the second pass with the same plan
            with pytest.raises(ValueError, match=message):
                table.assign([Span(second, 0, 1), Span(wrong, 0, 1)])
            assert list(table._row_of) == [first.rows[0].key]  # nothing was written or overwritten
    write = WorkerTable._write

    def fails(self: WorkerTable, number: int, row: Row) -> None:
        write(self, number, row)
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(WorkerTable, "_write", fails)
        with pytest.raises(MemoryError):
            table.assign([Span(second, 0, 1)])
    assert list(table._row_of) == [first.rows[0].key]
    written = table.n_written
    table.assign([Span(second, 0, 1), Span(first, 0, 1)])
    assert table.n_written == written + 1
    assert table.alpha[0, table.index, 0, 0].tolist()[:3] == [2, 1, 0]
    assert len(table._row_of) + len(table._free) == table.n_rows - 1


def test_the_table_keeps_its_addresses(served: ServedModel) -> None:
    table = table_for(served)
    layers = [table.layer(number) for number in range(served.n_layers)]
    before = [(layer.alpha.data_ptr(), layer.index.data_ptr()) for layer in layers]
    for number in range(20):
        table.assign([Span(Plan((plain_row(served, number + 1.0),), 0, 0, {}, 3), 0, 3)])
        assert all(float(layer.alpha[layer.index[0], 0, 0]) == number + 1 for layer in layers)
    assert before == [(layer.alpha.data_ptr(), layer.index.data_ptr()) for layer in layers]


def test_a_layer_that_lost_the_table_is_noticed(served: ServedModel) -> None:
    table = table_for(served)
    layers = [table.layer(number) for number in range(served.n_layers)]
    layers[1].alpha = layers[1].alpha.clone()
    table.assign([Span(None, 0, 3)])  # nothing is steered
    with pytest.raises(RuntimeError, match="the buffers of layer 1 were replaced"):
        table.assign([Span(Plan((plain_row(served, 1.0),), 0, 0, {}, 3), 0, 3)])


def test_a_rank_holds_its_own_heads(served: ServedModel) -> None:
    alpha = np.arange(served.n_layers * served.n_heads, dtype=np.float32).reshape(served.n_layers, served.n_heads) + 1
    half = served.n_heads // 2
    table = WorkerTable(served, range(half, 2 * half), max_requests=1, max_tokens=4, device=torch.device("cpu"))
    table.assign([Span(Plan((Row(alpha),), 0, 0, {}, 1), 0, 1)])
    np.testing.assert_array_equal(table.alpha[:, table.index[0], 0].numpy(), alpha[:, half : 2 * half])


def test_rows_of_the_first_runner_follow_its_batch(served: ServedModel) -> None:
    plan = Plan((plain_row(served, 1.0),), -1, 0, {}, 3)
    requests = {name: request(None) for name in "xyz"}
    requests["y"].sampling_params.extra_args = {"actscale_plan": plan.encoded()}
    requests["z"].sampling_params = None
    batch = SimpleNamespace(req_ids=["z", "y", "x"], num_reqs=3, num_computed_tokens_cpu=np.array([0, 2, 5, 9]))
    runner, cache = SimpleNamespace(input_batch=batch, requests=requests), runner_v1.PlanCache()
    for _ in range(2):
        found = runner_v1.spans(runner, np.array([2, 3, 1]), cache)
        assert [(span.plan is not None, span.start, span.n_tokens) for span in found] == [
            (False, 0, 2), (True, 2, 3), (False, 5, 1),
        ]  # fmt: skip
        assert found[1].plan is not None
        assert found[1].plan.row_numbers(2, 3).tolist() == [-1, 0, 0]
    requests["y"].sampling_params.extra_args = None  # the id of an earlier request, used again
    assert runner_v1.spans(runner, np.array([2, 3, 1]), cache)[1].plan is None


class FakeState:
    """The methods of vLLM's `DefaultModelState` that the plug-in wraps."""

    def add_request(self, req_index: int, new_req_data: Any) -> None: ...
    def remove_request(self, req_id: str) -> None: ...
    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        return {"seen": input_batch.req_ids}


def test_rows_of_the_second_runner_follow_its_batch(served: ServedModel) -> None:
    """With stand-ins: this runner needs a GPU."""
    table, state = table_for(served, max_requests=3), FakeState()
    runner_v2.follow(state, table)
    plan = Plan((plain_row(served, 4.0),), 0, -1, {}, 3)
    with_plan = SimpleNamespace(extra_args={"actscale_plan": plan.encoded()})
    for name, params in (("x", None), ("y", with_plan), ("z", SimpleNamespace(extra_args=None))):
        state.add_request(0, SimpleNamespace(req_id=name, sampling_params=params))

    def run(ids: list[str], starts: list[int], counts: list[int]) -> list[float]:
        batch = SimpleNamespace(
            req_ids=ids, num_reqs=len(ids), num_computed_tokens_np=np.array([*starts, 7]),
            num_scheduled_tokens=np.array(counts),
        )  # fmt: skip
        assert state.prepare_inputs(batch, None) == {"seen": ids}
        return table.alpha[0, table.index, 0, 0].tolist()  # type: ignore[no-any-return]

    assert run(["z", "y", "x"], [0, 1, 0], [2, 4, 1])[:7] == [0, 0, 4, 4, 0, 0, 0]
    assert run(["y"], [2], [1])[:2] == [4, 0]
    state.remove_request("y")
    state.add_request(1, SimpleNamespace(req_id="y", sampling_params=None))
    assert not any(run(["y"], [2], [1]))


def test_a_vector_at_a_module_that_a_path_names_cannot_be_served() -> None:
    model = tiny_model("gemma3_text")
    own = af.SteerVec.for_model(model, site="attn_out", projection="self_attn.o_proj")
    require_served(own, None)
    named = af.SteerVec.for_model(model, site="attn_out", projection="mlp.down_proj")
    with pytest.raises(ValueError, match=r"is the module 'mlp\.down_proj', but vLLM may edit another one there"):
        require_served(named, None)
