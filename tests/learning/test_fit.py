"""The fit engine against a plain derivation, and what it leaves behind when it is interrupted or fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from fit_cases import conflicts, interrupted_at, run
from torch import Tensor

import actscale_fast as af
from actscale_fast import ops
from actscale_fast.learning.engine import Engine
from actscale_fast.learning.fit_settings import FitSettings
from actscale_fast.learning.fit_state import FitState


def plain_fit(model: Any, examples: list[af.Example], objective: af.Objective, steps: int, lr: float) -> Tensor:
    """The same fit from the formulas: hooks, a forward pass for each prompt and direction, F.kl_div, torch's Adam."""
    tokenizer, beta = tiny.tokenizer(), 0.0
    alpha = torch.zeros(3, 4, requires_grad=True)
    adam = torch.optim.Adam([alpha], lr=lr, betas=(0.9, 0.99))

    def hook(layer: int) -> Callable[..., tuple[Tensor]]:
        return lambda _, inputs: ((inputs[0].unflatten(-1, (4, 8)) * (1 + beta * alpha[layer])[:, None]).flatten(-2),)

    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(hook(index)) for index, layer in enumerate(model.model.layers)
    ]
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
        adam.zero_grad()
        loss = torch.zeros(())
        for example in examples:
            ids = tokenizer(example.prompt, return_tensors="pt")["input_ids"]
            answers = tokenizer.convert_tokens_to_ids([example.correct.strip(), example.wrong.strip()])
            others = [token for token in range(len(tiny.WORDS)) if token not in answers]
            beta = 0.0
            reference = model(ids).logits[0, -1].detach()
            for direction in (1.0, -1.0):
                beta = direction
                z = model(ids).logits[0, -1]
                hinge = torch.relu(objective.margin - direction * (z[answers[0]] - z[answers[1]]))
                target, log_q = reference[others].log_softmax(-1), z[others].log_softmax(-1)
                loss = loss + hinge + objective.faithfulness * F.kl_div(log_q, target, log_target=True, reduction="sum")
        (loss / len(examples)).backward()
        adam.step()
        with torch.no_grad():
            second = adam.state[alpha]["exp_avg_sq"] / (1 - 0.99 ** (step + 1))
            threshold = objective.minimality * adam.param_groups[0]["lr"] / (second.sqrt() + 1e-8)
            alpha.copy_(alpha.sign() * (alpha.abs() - threshold).clamp(min=0))
    for handle in handles:
        handle.remove()
    return alpha.detach()


def test_a_fit_is_the_plain_derivation_to_rounding() -> None:
    model, examples = tiny.llama(), conflicts(5)
    objective = af.Objective(margin=2.0, faithfulness=0.7, minimality=0.2)
    expected = plain_fit(tiny.llama().requires_grad_(False), examples, objective, steps=6, lr=0.05)
    fitted = run(model, examples, objective, batch_size=8).intervention
    torch.testing.assert_close(fitted.alpha.detach().view(3, 4), expected, rtol=1e-3, atol=2e-5)
    assert 0 < fitted.n_active == int((expected != 0).sum())


def test_the_objective_falls() -> None:
    objective = af.Objective(margin=1.0, faithfulness=0.1, minimality=0.0)
    history = run(tiny.llama(), conflicts(6), objective, steps=30, batch_size=6).history
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert [record["step"] for record in history] == list(range(30))


def test_a_strong_l1_term_keeps_every_scalar_exactly_zero() -> None:
    result = run(tiny.llama(), conflicts(6), af.Objective(minimality=1e4))
    assert result.intervention.n_active == 0
    assert result.intervention.l1 == 0


def test_a_records_loss_is_that_of_one_state() -> None:
    objective = af.Objective(faithfulness=0.7, minimality=0.3)
    result = run(tiny.llama(), conflicts(4), objective)
    before = 0.0
    for record in result.history:
        terms = record["effectiveness"] + 0.7 * record["faithfulness"]
        assert record["loss"] == pytest.approx(terms + 0.3 * before, rel=1e-12)
        before = record["minimality"]
    assert (before, result.history[-1]["n_active"]) == (result.intervention.l1, result.intervention.n_active)
    assert before > 0


def test_a_fit_needs_gradients_and_enables_them() -> None:
    expected = run(tiny.llama(), conflicts(4)).intervention.alpha
    with torch.no_grad():
        assert torch.equal(run(tiny.llama(), conflicts(4)).intervention.alpha, expected)
        assert not torch.is_grad_enabled()
    model = tiny.llama()
    scalars = af.ActivScalar.for_model(model)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode\(\) rules out"):
        run(model, conflicts(4), intervention=scalars)


def test_generated_tokens_have_nothing_to_learn_from() -> None:
    model = tiny.llama()
    alone = af.ActivScalar.for_model(model, positions=[], generated=True)
    with pytest.raises(ValueError, match="intervention: it acts only on generated tokens"):
        run(model, conflicts(4), intervention=alone)
    beside = af.ActivScalar.for_model(model, positions=[-1], generated=True)
    run(model, conflicts(4), intervention=beside)
    assert beside.alpha[:, 0].any()
    assert not beside.alpha[:, 1].any()


def test_one_direction_learns_from_that_direction_alone() -> None:
    both = run(tiny.llama(), conflicts(6)).history[0]
    single = [run(tiny.llama(), conflicts(6), af.Objective(directions=(d,))).history[0] for d in (1, -1)]
    total = single[0]["effectiveness"] + single[1]["effectiveness"]
    assert total == pytest.approx(both["effectiveness"], rel=1e-5)


def test_accumulation_changes_the_memory_and_not_the_result() -> None:
    whole, parts = (run(tiny.llama(), conflicts(6), batch_size=5, accumulate=n).intervention.alpha for n in (1, 3))
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-5)


def test_seeds_decide_the_order_and_nothing_else_is_random() -> None:
    first, again, other = (run(tiny.llama(), conflicts(9), seed=seed).intervention.alpha for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_example_is_seen_once_an_epoch() -> None:
    seen = [row for step in range(7) for row in FitSettings(batch_size=4, seed=0).rows(14, step)]
    assert sorted(seen[:14]) == sorted(seen[14:]) == list(range(14))


def test_a_fit_leaves_the_model_as_it_was() -> None:
    model = tiny.llama().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    run(model, conflicts(4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_non_finite_term_stops_the_run_with_its_step_and_name() -> None:
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    scalars = af.ActivScalar.for_model(model)
    with pytest.raises(FloatingPointError, match="step 0: the faithfulness term is nan"):
        run(model, conflicts(4), intervention=scalars)
    assert scalars.n_active == 0
    assert model.lm_head.weight.requires_grad


def test_a_resumed_fit_has_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = run(tiny.llama(), conflicts(9), steps=8)
    path, model = tmp_path / "fit.safetensors", tiny.llama()
    with interrupted_at(5):
        run(model, conflicts(9), steps=8, checkpoint=path)
    assert model.training is False
    resumed = run(tiny.llama(), conflicts(9), steps=8, checkpoint=path)
    assert torch.equal(resumed.intervention.alpha, whole.intervention.alpha)
    assert resumed.history == whole.history
    assert [entry.name for entry in tmp_path.iterdir()] == ["fit.safetensors"]


def test_an_interruption_within_an_update_keeps_the_last_whole_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny.llama(), conflicts(9), steps=8)
    update = ops.proximal_adam_

    def interrupted(*arguments: Any, **options: Any) -> None:
        update(*arguments, **options)
        if arguments[4] == 6:
            raise KeyboardInterrupt

    path = tmp_path / "fit.safetensors"
    with monkeypatch.context() as context:
        context.setattr(ops, "proximal_adam_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tiny.llama(), conflicts(9), steps=8, checkpoint=path, checkpoint_every=4)
    resumed = run(tiny.llama(), conflicts(9), steps=8, checkpoint=path, checkpoint_every=4)
    assert torch.equal(resumed.intervention.alpha, whole.intervention.alpha)
    assert resumed.history == whole.history


def test_a_checkpoint_of_another_model_or_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    run(tiny.llama(), conflicts(4), checkpoint=path)
    with pytest.raises(ValueError, match=r"belongs to another fit: model '[^;]*; name"):
        run(tiny.llama(seed=1), conflicts(4), checkpoint=path)
    other = tiny.tokenizer()
    other.add_tokens(["capital of"])
    model = tiny.llama()
    model.resize_token_embeddings(len(other))
    with pytest.raises(ValueError, match=r"belongs to another fit: model .*; tokens '[^;]*; name"):
        af.fit(
            model, other, conflicts(4), af.ActivScalar.for_model(model), steps=6, batch_size=4, seed=3,
            checkpoint=path, progress=False,
        )  # fmt: skip


def test_an_interruption_between_a_record_and_its_release_counts_the_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tiny.llama(), conflicts(4))
    record = FitState.read

    class Interrupted(list[Any]):
        def append(self, item: Any) -> None:
            super().append(item)
            if item["step"] == 2:
                raise KeyboardInterrupt

    seen: list[FitState] = []

    def read(self: FitState, *, wait: bool) -> None:
        if not seen:
            seen.append(self)
            self.history = Interrupted()
        record(self, wait=wait)

    monkeypatch.setattr(FitState, "read", read)
    with pytest.raises(KeyboardInterrupt):
        run(tiny.llama(), conflicts(4))
    seen[0].history = list(seen[0].history)
    record(seen[0], wait=True)
    assert seen[0].history == whole.history[:3]


def test_a_finished_fit_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fit.safetensors"
    first = run(tiny.llama(), conflicts(4), checkpoint=path)
    monkeypatch.setattr(Engine, "gradients", None)
    again = run(tiny.llama(), conflicts(4), checkpoint=path)
    assert torch.equal(first.intervention.alpha, again.intervention.alpha)


def test_a_checkpoint_of_another_fit_is_refused_by_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    run(tiny.llama(), conflicts(4), checkpoint=path)
    scalars = af.ActivScalar.for_model(tiny.llama())
    with pytest.raises(ValueError, match=r"belongs to another fit: lr 0.05, now 0.1; seed 3, now 4"):
        run(tiny.llama(), conflicts(4), checkpoint=path, lr=0.1, seed=4, intervention=scalars)
    assert scalars.n_active == 0
    with pytest.raises(ValueError, match="belongs to another fit: examples"):
        run(tiny.llama(), conflicts(5), checkpoint=path)


def test_a_broken_checkpoint_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    run(tiny.llama(), conflicts(4), checkpoint=path)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not a checkpoint at all"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"fit\.safetensors is damaged, truncated or another kind of file"):
            run(tiny.llama(), conflicts(4), checkpoint=path)
        assert path.read_bytes() == broken
    run(tiny.llama(), conflicts(4), intervention=(scalars := af.ActivScalar.for_model(tiny.llama())))
    scalars.save_pretrained(tmp_path / "intervention")
    weights = next((tmp_path / "intervention").glob("*.safetensors"))
    with pytest.raises(ValueError, match="is not a checkpoint of a fit"):
        run(tiny.llama(), conflicts(4), checkpoint=weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected a positive integer"),
        ({"lr": -1.0}, "lr: got -1.0, expected a positive number"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"batch_size": 2.5}, "batch_size: got 2.5"),
        ({"schedule": "step"}, "schedule: got 'step', expected"),
        ({"betas": (0.9, 1.0)}, r"betas: got \(0.9, 1.0\), expected two numbers in \[0, 1\)"),
        ({"betas": 0.9}, "betas: got 0.9"),
        ({"seed": 1.5}, "seed: got 1.5, expected an integer"),
        ({"cache_bytes": 2e9}, "cache_bytes: got 2000000000.0, expected an integer that is at least 0"),
        ({"tolerance": -1}, "tolerance: got -1, expected None or a number >= 0"),
    ],
)
def test_bad_settings_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny.llama(), conflicts(2), **options)
    with pytest.raises(TypeError, match="objective: got dict, expected an Objective"):
        run(tiny.llama(), conflicts(2), {"margin": 1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"margin": -1}, "margin: got -1, expected a finite number >= 0"),
        ({"faithfulness": float("inf")}, "faithfulness: got inf"),
        ({"kl": "both"}, "kl: got 'both', expected 'forward' or 'reverse'"),
        ({"directions": (2,)}, r"directions: got \(2,\), expected"),
        ({"directions": 1}, "directions: got 1, expected"),
        ({"directions": ()}, r"directions: got \(\), expected"),
    ],
)
def test_an_objective_refuses_what_makes_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        af.Objective(**fields)


def test_execution_and_checkpoint_are_what_the_keywords_were(tmp_path: Path) -> None:
    results = []
    for name, options in {
        "objects": {
            "execution": af.Execution(accumulate=2, cache_bytes=0),
            "checkpoint": af.Checkpoint(tmp_path / "objects", every=3),
        },
        "keywords": {
            "accumulate": 2, "cache_bytes": 0, "checkpoint": tmp_path / "keywords", "checkpoint_every": 3,
        },
    }.items():  # fmt: skip
        scalars = af.ActivScalar.for_model(tiny.llama())
        run(tiny.llama(), conflicts(5), steps=4, intervention=scalars, **options)
        results.append((scalars.alpha.detach(), (tmp_path / name).read_bytes()))
    (first, file), (second, other_file) = results
    assert torch.equal(first, second)
    assert file == other_file


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"acumulate": 2}, TypeError, r"fit\(\) got an unexpected keyword argument 'acumulate'"),
        ({"execution": {"accumulate": 2}}, TypeError, "execution: got dict, expected an Execution or None"),
        ({"accumulate": 0}, ValueError, "accumulate: got 0, expected a positive integer"),
        ({"memory_bytes": -1}, ValueError, "memory_bytes: got -1, expected an integer that is at least 0"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every: got 0, expected a positive integer"),
    ],
)
def test_a_wrong_execution_is_refused_by_name(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(tiny.llama(), conflicts(3), steps=1, **options)
