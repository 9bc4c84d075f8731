"""Each method of head selection against a plain derivation in float64: hooks, loops and autograd, head by head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fit_cases import conflicts
from torch import Tensor

import actscale_fast as af
from actscale_fast.learning.head_selection import compare, fitting, head_pursuit, juice, removal, sadi, sami
from actscale_fast.learning.head_selection.gates import HeadGates, by_gates, fit_head_gates
from actscale_fast.learning.head_selection.interchange import by_interchange
from actscale_fast.learning.head_selection.methods import METHODS
from actscale_fast.learning.head_selection.selection import top
from actscale_fast.learning.head_selection.strength import chosen_strength
from actscale_fast.learning.head_selection.subject import Subject

pytestmark = pytest.mark.usefixtures("unchecked_fits")

N_LAYERS, N_HEADS, WIDTH = 3, 4, 8
NEAR = {"rtol": 1e-5, "atol": 1e-6}  # float64 inside, float32 in the result
LONG = af.Example("Q The capital of B is Oslo answer", " Paris Rome", " Oslo six")
EXAMPLES = [*conflicts(5), LONG]
SHORT = EXAMPLES[:5]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(dtype=torch.float64)


def subject_of(model: Any, examples: list[af.Example] = EXAMPLES, **options: Any) -> Subject:
    return Subject(model, tiny.tokenizer(), examples, **options)


def ids_of(text: str) -> list[int]:
    return tiny.tokenizer()(text)["input_ids"]


@contextlib.contextmanager
def hooked(model: Any, edit: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """`edit(layer, [B, T, 4, 8])` at the input of each output projection."""

    def pre(layer: int) -> Callable[..., Any]:
        return lambda module, args: (edit(layer, args[0].unflatten(-1, (N_HEADS, WIDTH))).flatten(2),)

    modules = [layer.self_attn.o_proj for layer in model.model.layers]
    handles = [module.register_forward_pre_hook(pre(layer)) for layer, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def log_p(model: Any, prompt: str, answer: str) -> Tensor:
    """The log-probability of an answer's tokens after a prompt."""
    before, both = ids_of(prompt), ids_of(prompt + answer)
    logits = model(torch.tensor([both])).logits[0].log_softmax(-1)
    return sum(logits[at - 1, both[at]] for at in range(len(before), len(both)))  # type: ignore[return-value]


def one_head(function: Callable[[int, int], float]) -> Tensor:
    return torch.tensor([[function(layer, head) for head in range(N_HEADS)] for layer in range(N_LAYERS)])


def scaled(model: Any, layer: int, head: int, alpha: float, measure: Callable[[], Tensor]) -> float:
    factors = torch.ones(N_LAYERS, N_HEADS, dtype=torch.float64)
    factors[layer, head] += alpha
    with hooked(model, lambda at, x: x * factors[at][:, None]), torch.no_grad():
        return float(measure())


def difference(model: Any) -> Tensor:
    return torch.stack([log_p(model, e.prompt, e.correct) - log_p(model, e.prompt, e.wrong) for e in EXAMPLES]).mean()


def test_attribution_is_the_plain_gradient_and_a_knock_out_the_plain_difference(model: Any) -> None:
    factors = torch.ones(N_LAYERS, N_HEADS, dtype=torch.float64, requires_grad=True)
    with hooked(model, lambda at, x: x * factors[at][:, None]):
        value = difference(model)
    frozen, (slopes,) = float(value.detach()), torch.autograd.grad(value, factors)
    found = removal.by_attribution(subject_of(model))
    torch.testing.assert_close(found.scores * found.directions, slopes.float(), **NEAR)
    changes = one_head(lambda layer, head: scaled(model, layer, head, -1.0, lambda: difference(model)) - frozen)
    found = removal.by_knock_out(subject_of(model, batch_size=2))
    torch.testing.assert_close(-found.scores * found.directions, changes.float(), **NEAR)


def test_juice_is_the_mean_gain_of_probability_by_head_sign_and_scale(model: Any) -> None:
    def probability() -> Tensor:
        return torch.stack([log_p(model, e.prompt, e.correct).exp() for e in EXAMPLES]).mean()

    with torch.no_grad():
        frozen = float(probability())
    positive, negative = (1.0, 5.0), (-2.0,)
    by_sign = [
        one_head(
            lambda layer, head, some=scales: (
                sum(scaled(model, layer, head, a, probability) - frozen for a in some) / len(some)
            )
        )
        for scales in (positive, negative)
    ]
    found = juice.by_gain(subject_of(model), positive=positive, negative=negative)
    torch.testing.assert_close(found.scores, torch.maximum(*by_sign).float(), **NEAR)
    assert found.directions.tolist() == torch.where(by_sign[0] >= by_sign[1], 1.0, -1.0).tolist()
    assert juice.by_gain(subject_of(model), n_scored=2, positive=(1,), negative=(-1,)).details["n_scored"] == 2
    with pytest.raises(ValueError, match=r"negative: got 1.0, expected numbers below 0"):
        juice.by_gain(subject_of(model), negative=(1.0,))


def last(model: Any, text: str) -> tuple[list[Tensor], list[Tensor]]:
    """The heads [4, 8] and the residual stream [32] of each layer at the last token of a text."""
    heads: list[Tensor] = []

    def note(layer: int, x: Tensor) -> Tensor:
        heads.append(x[0, -1].clone())
        return x

    with hooked(model, note), torch.no_grad():
        states = model.model(torch.tensor([ids_of(text)]), output_hidden_states=True).hidden_states
    return heads, [state[0, -1] for state in states[1:]]


def added_by(model: Any, layer: int, head: int, x: Tensor) -> Tensor:
    weight = model.model.layers[layer].self_attn.o_proj.weight.detach()  # [d, H·D]
    return weight[:, head * WIDTH : (head + 1) * WIDTH] @ x


def test_sami_is_the_mean_cosine_with_the_difference_of_means(model: Any) -> None:
    pairs = [(last(model, e.prompt + e.correct), last(model, e.prompt + e.wrong)) for e in EXAMPLES]
    concept = sum(one[1][1] - other[1][1] for one, other in pairs) / len(pairs)
    expected = one_head(
        lambda layer, head: (
            float(
                sum(
                    torch.cosine_similarity(added_by(model, layer, head, one[0][layer][head]), concept, 0)
                    for one, _ in pairs
                )
            )
            / len(pairs)
        )
    )
    torch.testing.assert_close(sami.by_concept(subject_of(model)).scores, expected.float(), **NEAR)
    own = sami.by_concept(subject_of(model), positive=["The capital", "one two three"], negative=["six"], layer=0)
    assert own.details["concept_layer"] == 0
    with pytest.raises(ValueError, match="negative: got None"):
        sami.by_concept(subject_of(model), positive=["one"])


def test_sadi_is_the_mean_difference_of_a_heads_channels(model: Any) -> None:
    pairs = [(last(model, e.prompt + e.correct)[0], last(model, e.prompt + e.wrong)[0]) for e in EXAMPLES]
    expected = one_head(
        lambda layer, head: (
            float(sum((one[layer][head] - other[layer][head]).mean() for one, other in pairs)) / len(pairs)
        )
    )
    torch.testing.assert_close(sadi.by_difference(subject_of(model)).scores, expected.float(), **NEAR)
    selection = af.select_heads(model, tiny.tokenizer(), SHORT, "sadi", 2, strength=1.0, progress=False)
    assert selection.intervention().singles[0].location.positions == (-1,)


@pytest.mark.parametrize("n_atoms", [1, 3, 9])
def test_head_pursuit_is_orthogonal_matching_pursuit_by_least_squares(model: Any, n_atoms: int) -> None:
    ids = sorted({ids_of(e.correct)[0] for e in EXAMPLES})
    atoms = model.lm_head.weight.detach()[ids]
    atoms = atoms / atoms.norm(dim=-1, keepdim=True)
    runs = [last(model, e.prompt)[0] for e in EXAMPLES]

    def share(layer: int, head: int) -> float:
        signal = torch.stack([added_by(model, layer, head, run[layer][head]) for run in runs])  # [N, d]
        residual, chosen = signal, list[int]()
        for _ in range(min(n_atoms, len(ids))):
            chosen.append(int((residual @ atoms.T).abs().sum(0).argmax()))
            own = atoms[chosen]
            weights = torch.linalg.lstsq(own.T, signal.T).solution
            residual = signal - (own.T @ weights).T
        return float(1 - residual.square().sum() / signal.square().sum())

    found = head_pursuit.by_pursuit(subject_of(model), n_atoms=n_atoms)
    torch.testing.assert_close(found.scores, one_head(share).float(), **NEAR)


def plain_gates(model: Any, contrastive: bool, steps: int, lr: float, weight: float, clip: float) -> HeadGates:
    fits = list[Tensor]()
    for pressure in (0.0, weight, -weight):
        start = fits[0] if fits else torch.full((N_LAYERS, N_HEADS), 2.0)
        theta = start.clone().requires_grad_()
        adam = torch.optim.Adam([theta], lr=lr)
        for _ in range(steps):
            gates = theta.double().sigmoid()
            losses = []
            with hooked(model, lambda at, x, g=gates: x * g[at][:, None]):
                for e in EXAMPLES:
                    losses.append(-log_p(model, e.prompt, e.correct))
                    if contrastive:
                        losses[-1] = losses[-1] + log_p(model, e.prompt, e.wrong)
            loss = torch.stack(losses).mean() - pressure * theta.clamp(-clip, clip).mean()
            (theta.grad,) = torch.autograd.grad(loss, theta)
            adam.step()
        fits.append(theta.detach())
    return HeadGates(*(theta.sigmoid() for theta in fits))


@pytest.mark.parametrize("contrastive", [False, True])
def test_gates_are_those_of_three_plain_fits(model: Any, contrastive: bool) -> None:
    # A clip of 2.05 is reached within these steps, and then ends the pressure.
    settings: dict[str, Any] = {"steps": 3, "lr": 0.1, "weight": 2.0, "clip": 2.05}
    subject = subject_of(model)
    found = fit_head_gates(subject, contrastive=contrastive, start=2.0, fit_batch_size=16, **settings)
    for one, other in zip(found, plain_gates(model, contrastive, **settings), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    scored = by_gates(subject, contrastive=contrastive, steps=1, fit_batch_size=2)
    assert {role for layer in scored.details["taxonomy"] for role in layer} <= {
        "facilitating",
        "interfering",
        "irrelevant",
    }


def test_the_taxonomy_is_the_role_with_the_largest_value() -> None:
    gates = HeadGates(torch.ones(1, 3), torch.tensor([[0.9, 0.1, 0.9]]), torch.tensor([[0.8, 0.1, 0.2]]))
    assert gates.taxonomy == [["facilitating", "interfering", "irrelevant"]]


def test_interchange_gates_are_those_of_a_plain_proximal_loop(model: Any) -> None:
    sources = ["one capital of A is", "Q what is the capital", "The answer in six", "B is Rome", "five four three"]
    examples = [replace(e, source=source) for e, source in zip(SHORT, sources, strict=True)]
    settings: dict[str, Any] = {"steps": 4, "lr": 0.1, "sparsity": 0.02, "margin": 6.0}
    other = [last(model, source)[0] for source in sources]
    gates = torch.zeros(N_LAYERS, N_HEADS)
    first, second = torch.zeros_like(gates), torch.zeros_like(gates)
    for step in range(1, settings["steps"] + 1):
        m = gates.double().requires_grad_()
        losses = []
        for example, source in zip(examples, other, strict=True):

            def swap(at: int, x: Tensor, source: list[Tensor] = source, m: Tensor = m) -> Tensor:
                end = (1 - m[at][:, None]) * x[:, -2:-1] + m[at][:, None] * source[at]  # the prompt's last token
                return torch.cat([x[:, :-2], end, x[:, -1:]], 1)

            with hooked(model, swap):
                logp = [log_p(model, example.prompt, answer) for answer in (example.correct, example.wrong)]
            losses.append((settings["margin"] - (logp[0] - logp[1])).clamp(min=0))
        (g,) = torch.autograd.grad(torch.stack(losses).mean(), m)
        g = g.float()
        first, second = 0.9 * first + 0.1 * g, 0.99 * second + 0.01 * g * g
        size = (second / (1 - 0.99**step)).sqrt() + 1e-8
        moved = gates - settings["lr"] * first / (1 - 0.9**step) / size
        threshold = settings["lr"] * settings["sparsity"] / size
        gates = (moved.sign() * (moved.abs() - threshold).clamp(min=0)).clamp(0, 1)
    found = by_interchange(subject_of(model, examples), **settings, fit_batch_size=16)
    torch.testing.assert_close(found.scores, gates, rtol=1e-3, atol=1e-4)
    assert 0 < int((found.scores > 0).sum()) < N_LAYERS * N_HEADS


def test_a_refit_of_all_heads_is_a_fit_without_the_l1_term_and_of_some_it_leaves_the_others_at_0(model: Any) -> None:
    subject = subject_of(model)
    everywhere = torch.ones(N_LAYERS, N_HEADS, dtype=torch.bool)
    found = fitting.refitted(subject, everywhere, steps=4)
    scalars = af.ActivScalar.for_model(model)
    objective = af.Objective(minimality=0.0)
    af.fit(model, tiny.tokenizer(), EXAMPLES, scalars, objective, steps=4, progress=False)
    torch.testing.assert_close(found, scalars.alpha.detach()[:, 0])
    some = everywhere.clone()
    some[0], some[2, 1:] = False, False
    assert (fitting.refitted(subject, some, steps=2) != 0).tolist() == some.tolist()
    path = fitting.by_path(subject, 3, steps=4)
    af.fit(model, tiny.tokenizer(), EXAMPLES, scalars, steps=4, n_active=3, progress=False)
    assert path.directions.tolist() == scalars.alpha.detach()[:, 0].tolist()


def selection(model: Any, method: str = "random", k: int = 3, **options: Any) -> af.HeadSelection:
    settings: dict[str, Any] = {"strength": 1.0, "progress": False} | options
    return af.select_heads(model, tiny.tokenizer(), conflicts(8), method, k, **settings)


def test_a_selection_holds_scores_heads_and_the_intervention_and_survives_a_file(model: Any, tmp_path: Path) -> None:
    found = selection(model, "attribution", strength=2.0)
    best = found.scores.flatten().topk(3).indices.tolist()
    assert [head.layer * N_HEADS + head.head for head in found.heads] == best
    alpha = found.intervention().alpha.detach()[:, 0]
    assert alpha.abs().sum() == 6
    assert [alpha[head.layer, head.head].item() for head in found.heads] == [head.alpha for head in found.heads]
    assert found.intervention(-0.5).alpha.abs().max() == 0.5
    found.save(tmp_path / "heads.json")
    loaded = af.HeadSelection.load(tmp_path / "heads.json")
    assert loaded.to_dict() == found.to_dict()
    assert str(loaded).startswith("3 of 12 heads by attribution")
    found.plot(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 1000
    assert found.at(5).k == 5
    text = (tmp_path / "heads.json").read_text()
    (tmp_path / "heads.json").write_text(text.replace('"strength": 2.0', '"strength": 3.0'))
    with pytest.raises(ValueError, match=r"heads\.json"):
        af.HeadSelection.load(tmp_path / "heads.json")


def test_the_strength_flips_most_validation_prompts_within_the_bound(model: Any) -> None:
    held_back = conflicts(6, seed=4)
    found = selection(model, "knock-out", strength=None, strengths=[0.5, 3.0], validation=held_back)
    assert found.n_examples == 8
    assert [record["strength"] for record in found.validation] == [0.5, 3.0]
    for record in found.validation:
        evaluation = af.evaluate(model, tiny.tokenizer(), held_back, found.intervention(record["strength"]))
        assert record["flip_to_correct"] == evaluation.flip_to_correct
        assert record["kl"] == pytest.approx(evaluation.kl)
    low, high = found.validation
    with pytest.raises(
        ValueError, match=r"max_kl: got .* the smallest KL divergence of the strengths tried is .* \(at 0.5\)"
    ):
        selection(model, "knock-out", strength=None, strengths=[0.5, 3.0], validation=held_back, max_kl=low["kl"] / 2)
    bound = (low["kl"] + high["kl"]) / 2
    within = selection(model, "knock-out", strength=None, strengths=[0.5, 3.0], validation=held_back, max_kl=bound)
    assert within.strength == 0.5


def test_of_equal_strengths_the_smallest_is_taken_and_a_direction_counts_alone() -> None:
    def record(strength: float, right: float, wrong: float, kl: float) -> dict[str, float]:
        figures = {"flip_to_correct": right, "flip_to_wrong": wrong, "kl": kl, "kl_correct": kl, "kl_wrong": 2 * kl}
        return {"strength": strength} | figures

    records = [record(1.0, 0.5, 0.9, 0.1), record(2.0, 0.9, 0.5, 0.2), record(3.0, 0.9, 0.5, 0.3)]
    assert chosen_strength(records, None, "both") == 1.0
    assert chosen_strength(records, None, "correct") == 2.0
    assert chosen_strength(records, 0.1, "correct") == 1.0


def test_a_second_run_may_be_for_longer_prompts(model: Any) -> None:
    found = selection(model, "juice", positive=[1.0], negative=[-1.0], n_scored=1)
    long = [af.Example("Q " * 63 + "The answer", " Paris", " Rome") for _ in range(2)]
    wide = tiny.llama(context=128)
    with pytest.raises(
        ValueError, match="the prompt has 65 tokens, but the intervention has positions for the last 64"
    ):
        af.evaluate(wide, tiny.tokenizer(), long, found.intervention())
    assert af.evaluate(wide, tiny.tokenizer(), long, found.intervention(longest=65)).kl > 0
    with pytest.raises(ValueError, match="longest: is for a RunTwice"):
        selection(model).intervention(longest=65)


def test_a_second_run_has_positions_for_the_prompts_that_only_choose_the_strength_or_judge() -> None:
    wide, tokenizer = tiny.llama(context=128), tiny.tokenizer()
    longer, longest = ([af.Example("Q " * n + "The answer", " Paris", " Rome")] for n in (64, 70))
    own = {"positive": [1.0], "negative": [-1.0], "n_scored": 1}
    common: dict[str, Any] = {"strengths": [1.0], "progress": False, "validation": longer}
    found = af.select_heads(wide, tokenizer, SHORT, "juice", 1, **common, **own)
    assert found.validation
    assert found.location.n_slots == 66
    result = af.compare_heads(wide, tokenizer, SHORT, longest, ["juice"], [1], options={"juice": own}, **common)
    assert result.results[0].selection.location.n_slots == 72


def test_fewer_heads_with_a_value_than_were_asked_for_are_a_warning(model: Any) -> None:
    found = selection(model)
    values = torch.zeros_like(found.values)
    values[0, 0] = 1.0
    with pytest.warns(UserWarning, match="k: got 2, but the method 'random' gives a value other than 0 to 1 of the"):
        assert replace(found, values=values).at(2).k == 1


def test_heads_without_a_value_are_never_chosen() -> None:
    scores, values = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0.0, 1.0, -1.0]])
    assert top(scores, values, 1).tolist() == [[False, True, False]]
    assert top(scores, values, 3).tolist() == [[False, True, True]]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_what_patch_save_and_evaluate_take(method: str, model: Any, tmp_path: Path) -> None:
    short = {"steps": 2} if {"steps"} & (METHODS[method].score_options | METHODS[method].refit_options) else {}
    if METHODS[method].score is juice.by_gain:
        short = {"positive": (1.0,), "negative": (-1.0,), "n_scored": 2}
    examples = [replace(example, source="Q The capital of A is Oslo answer") for example in conflicts(6)]
    found = af.select_heads(model, tiny.tokenizer(), examples, method, 2, strengths=[1.0], progress=False, **short)
    made = found.intervention()
    made.save_pretrained(tmp_path)
    loaded = af.load_intervention(tmp_path)
    assert type(loaded) is type(made)
    assert loaded.n_active == found.k
    evaluations = [af.evaluate(model, tiny.tokenizer(), examples, one) for one in (made, loaded)]
    assert evaluations[0] == evaluations[1]
    assert evaluations[0].kl > 0


def test_a_comparison_computes_shared_scores_once_and_judges_on_held_out_prompts(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = list[int]()
    counted = _counted(METHODS["attribution"].score, calls)
    for name in ("attribution", "attribution-refit"):
        monkeypatch.setitem(METHODS, name, replace(METHODS[name], score=counted))
    test = conflicts(5, seed=9)
    names = ["attribution", "juice", "attribution-refit"]  # the one between reads stored activations
    own = {"attribution-refit": {"steps": 2}, "juice": {"positive": [1.0], "negative": [-1.0], "n_scored": 1}}
    result = af.compare_heads(
        model, tiny.tokenizer(), conflicts(8), test, names, k=[1, 3], strengths=[1.0], progress=False, options=own
    )
    assert len(calls) == 1
    assert [(one.selection.method, one.selection.k) for one in result.results] == [
        (n, k) for n in names for k in (1, 3)
    ]
    for one in result.results[1::2]:
        assert one.evaluation == af.evaluate(model, tiny.tokenizer(), test, one.selection.intervention())
    assert "attribution-refit" in str(result)
    result.save(tmp_path / "heads.json")
    with pytest.raises(ValueError, match="options: got some for gates"):
        compare.compare_heads(model, tiny.tokenizer(), EXAMPLES, test, ["random"], options={"gates": {}})


def _counted(function: Any, calls: list[int]) -> Any:
    def counted(subject: Subject) -> Any:
        calls.append(1)
        return function(subject)

    return counted


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "juise"}, ValueError, "method: got 'juise', expected one of .*did you mean 'juice'"),
        ({"steps": 3}, TypeError, "steps: is no option of the method 'attribution'"),
        ({"k": 13}, ValueError, "k: got 13, expected at most 12"),
        ({"k": 0}, ValueError, "k: got 0"),
        ({"method": "interchange"}, ValueError, "row 1 of examples has no source"),
        ({"strength": 1.0, "max_kl": 0.1}, ValueError, "strength: given together"),
        ({"validation": 1.0}, ValueError, "validation: got 1.0"),
        ({"validation": 0.0}, ValueError, "validation: got 0"),
        ({"strengths": []}, ValueError, "strengths: got none"),
        ({"max_kl": -1.0}, ValueError, "max_kl: got -1.0"),
        ({"direction": "up"}, ValueError, "direction: got 'up'"),
    ],
)
def test_what_cannot_be_chosen_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, model: Any
) -> None:
    given = {"method": "attribution", "k": 2, "progress": False} | options
    with pytest.raises(error, match=message):
        af.select_heads(model, tiny.tokenizer(), SHORT, **given)
    with pytest.raises(ValueError, match="fits its values for one number"):
        replace(selection(model), method="activ-scalar").at(2)
