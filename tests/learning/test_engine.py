"""A step of the engine: positions, objectives, heads, groups and budgets against the full computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import PROMPTS, TokenExamples, assert_equal_to_rounding, engine, full
from model_zoo import randomised, tiny_model
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast.learning.engine import Engine, FitRequest

OBJECTIVE = af.Objective(margin=3.0, faithfulness=0.7)


def scalars(model: Any, scale: float = 0.3, **where: Any) -> af.ActivScalar:
    made = randomised(af.ActivScalar.for_model(model, **where))
    with torch.no_grad():
        made.alpha.mul_(scale)
    return made  # type: ignore[return-value]


def model_of(family: str = "llama", **changes: Any) -> Any:
    return tiny_model(family, dtype=torch.float64, **changes)


def agree(model: Any, intervention: Any, objective: af.Objective = OBJECTIVE, **options: Any) -> None:
    data = TokenExamples()
    expected = full(model, data, intervention, objective)
    assert_equal_to_rounding(engine(model, data, intervention, objective, **options), expected)


@pytest.mark.parametrize(
    "positions",
    [[-1, -2, -4], [0], [0, -1], [2, 5], [1, -1, 11], [-12, -3], [7], [40], [-40], [3, -1]],
    ids=str,
)
@pytest.mark.parametrize("where", [{}, {"layers": [1]}, {"site": "residual", "layers": [0]}], ids=str)
def test_positions_count_from_either_end_of_prompts_of_any_length(positions: list[int], where: dict[str, Any]) -> None:
    model = model_of()
    agree(model, scalars(model, positions=positions, **where))
    agree(model, scalars(model, 0.0, positions=positions, **where))


def test_a_position_outside_every_prompt_has_no_gradient() -> None:
    model = model_of()
    for positions in ([40], [-40], [12]):
        terms, gradients = engine(model, TokenExamples(), scalars(model, positions=positions), OBJECTIVE)
        assert not gradients[0].any()
        assert terms[1] == 0


def test_generated_tokens_have_no_gradient_beside_a_prompts() -> None:
    model = model_of()
    beside = scalars(model, positions=[-1], generated=True)
    agree(model, beside)
    assert not engine(model, TokenExamples(), beside, OBJECTIVE)[1][0][:, 1].any()


@pytest.mark.parametrize(
    "objective",
    [
        af.Objective(margin=3.0, faithfulness=0.7, kl="reverse"),
        af.Objective(margin=3.0, faithfulness=0.7, exclude_answers=False),
        af.Objective(margin=3.0, faithfulness=0.7, exclude_answers=False, kl="reverse"),
        af.Objective(margin=3.0, faithfulness=0.7, directions=(1,)),
        af.Objective(margin=3.0, faithfulness=0.7, directions=(-1,)),
        af.Objective(margin=3.0, faithfulness=0.7, directions=(-1, 1)),
        af.Objective(margin=0.0, faithfulness=0.0),
    ],
    ids=["reverse", "all tokens", "all tokens, reverse", "plus", "minus", "minus, plus", "nothing"],
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_objectives_are_those_of_the_full_computation(family: str, objective: af.Objective) -> None:
    model, data = model_of(family, **({"final_logit_softcapping": 5.0} if family == "gemma2" else {})), TokenExamples()
    if family == "gemma2":  # its padding is NaN in float64
        data = TokenExamples([prompt for prompt in PROMPTS if len(prompt) == 12])
    for intervention in (scalars(model), scalars(model, 0.0), scalars(model, positions=[-1])):
        expected = full(model, data, intervention, objective)
        assert_equal_to_rounding(engine(model, data, intervention, objective), expected)


class Wrapped(nn.Module):
    """A head that is no linear layer by its looks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden)


class Doubled(nn.Linear):
    """A head that looks like one and computes something else."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


def wrapped(model: Any) -> None:
    model.lm_head = Wrapped(model.lm_head)


def doubled(model: Any) -> None:
    model.lm_head.__class__ = Doubled


def watched(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, inputs, output: None)


def shifted(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.tanh())


def edited_after(model: Any) -> None:
    def halve(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.logits = output.logits / 2
        return output

    model.register_forward_hook(halve)


@pytest.mark.parametrize("change", [wrapped, doubled, watched, shifted, edited_after])
@pytest.mark.parametrize("where", [{}, {"positions": [-1]}, {"layers": [1]}], ids=str)
def test_a_head_that_is_not_plain_goes_through_its_logits(change: Any, where: dict[str, Any]) -> None:
    model = model_of()
    change(model)
    for scale in (0.3, 0.0):
        agree(model, scalars(model, scale, **where))
    with Engine(model, TokenExamples(), scalars(model), [OBJECTIVE]) as opened:
        assert opened.runner.head is None


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gptj", {}),
        ("phi", {}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 3.0}),
        ("gemma3_text", {"final_logit_softcapping": 4.0}),
        ("llama", {"tie_word_embeddings": True}),
    ],
)
def test_heads_with_bias_scale_soft_cap_or_ties_are_numbers(family: str, changes: dict[str, Any]) -> None:
    model = model_of(family, **changes)
    agree(model, scalars(model, positions=[-2]))
    with Engine(model, TokenExamples(), scalars(model), [OBJECTIVE]) as opened:
        assert opened.runner.head is not None


def test_a_head_whose_input_another_hook_edits_is_followed() -> None:
    model = model_of()
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))
    agree(model, scalars(model, layers=[1]))


@pytest.mark.parametrize("where", [{}, {"layers": [1]}, {"positions": [-2, -1], "layers": [1]}], ids=str)
def test_groups_with_their_own_objectives_are_single_steps(where: dict[str, Any]) -> None:
    model, data = model_of(), TokenExamples()
    singles = [scalars(model, 0.3, **where), scalars(model, 0.0, **where), scalars(model, -0.2, **where)]
    objectives = [
        af.Objective(margin=3.0, faithfulness=0.7),
        af.Objective(margin=1.0, faithfulness=0.2, kl="reverse", directions=(1,)),
        af.Objective(margin=2.0, faithfulness=1.5, exclude_answers=False),
    ]
    rows = [[0, 1, 2, 3], [2, 0], [3]]
    stack = af.ActivScalar.stack(singles)
    with Engine(model, data, stack, objectives) as opened:
        terms, gradients = opened.gradients(
            [FitRequest(*share) for share in zip(rows, objectives, range(3), strict=True)],
        )
        again, alone = opened.gradients([FitRequest(rows[2], objectives[2], 2)])
    for index, single in enumerate(singles):
        expected = full(model, data, single, objectives[index], rows[index])
        assert_equal_to_rounding((terms[index], [gradients[0][index]]), expected)
    torch.testing.assert_close(again[0], terms[2])
    torch.testing.assert_close(alone[0][2], gradients[0][2])
    assert not alone[0][:2].any()


def test_a_share_that_is_not_finite_leaves_the_others_terms_alone() -> None:
    model, data = model_of(), TokenExamples()
    stack = af.ActivScalar.stack([scalars(model), scalars(model)])
    with Engine(model, data, stack, [OBJECTIVE]) as opened:
        with torch.no_grad():
            stack.alpha[1] = float("inf")
        terms, gradients = opened.gradients([FitRequest([0, 1], OBJECTIVE, 0), FitRequest([0, 1], OBJECTIVE, 1)])
    assert terms[0].isfinite().all()
    assert not terms[1].isfinite().all()
    assert_equal_to_rounding((terms[0], [gradients[0][0]]), full(model, data, scalars(model), OBJECTIVE, [0, 1]))


def test_a_parameter_that_is_not_learned_still_acts() -> None:
    class Both(af.ActivScalar):
        """h·(1 + β·α) + β·h·offset, the offset fixed."""

        @classmethod
        def parameter_tails(cls, location: Any) -> dict[str, tuple[int, ...]]:
            return {"alpha": (location.n_heads,), "offset": (location.n_heads,)}

        def edit(self, x: Tensor, layer: int, strength: Any, placement: Any) -> Tensor:
            both = self.alpha + self.offset
            return af.ops.scale_heads(x, placement.of(self.of_layer(both, layer, x.device)), strength=strength)

    model = model_of()
    both = Both.for_model(model)
    with torch.no_grad():
        both.offset[0] = 0.4
    both.offset.requires_grad_(False)
    try:
        agree(model, both)
    finally:
        del af.interventions.Intervention.classes["Both"]


def test_several_steps_of_one_engine_follow_the_parameters() -> None:
    model, data = model_of(), TokenExamples()
    moving = scalars(model, 0.0)
    with Engine(model, data, moving, [OBJECTIVE]) as opened:
        for seed in range(4):
            with torch.no_grad():
                moving.alpha.normal_(generator=torch.Generator().manual_seed(seed)).mul_(0.2)
                moving.alpha[: seed % 3] = 0
            found = opened.gradients([FitRequest([3, 1, seed % 3], OBJECTIVE)])
            expected = full(model_of(), data, moving, OBJECTIVE, [3, 1, seed % 3])
            assert_equal_to_rounding((found[0][0], found[1]), expected)


def test_an_example_may_stand_in_a_batch_twice() -> None:
    model, data = model_of(), TokenExamples()
    found = engine(model, data, scalars(model, positions=[-1]), OBJECTIVE, rows=[2, 0, 2])
    assert_equal_to_rounding(found, full(model, data, scalars(model, positions=[-1]), OBJECTIVE, [2, 0, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_no_worse_than_the_full_computations(dtype: torch.dtype) -> None:
    exact_model, data = model_of(), TokenExamples()
    model = model_of().to(dtype)
    exact_model.load_state_dict(model.state_dict())
    for where in ({}, {"positions": [-1]}):
        intervention = scalars(model, **where)
        exact = full(exact_model, data, intervention, OBJECTIVE)[1][0]
        errors = [
            (gradients[0] - exact).abs().max().item()
            for _, gradients in (
                engine(model, data, intervention, OBJECTIVE),
                full(model, data, intervention, OBJECTIVE),
            )
        ]
        eps = torch.finfo(dtype).eps * exact.abs().max().item()
        assert errors[0] <= 2 * errors[1] + 4 * eps
