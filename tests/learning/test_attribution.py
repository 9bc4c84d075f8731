"""Attribution against plain derivations: autograd and differences through hooks, one forward pass for each head."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import model_zoo
import pytest
import tiny
import torch
from fit_cases import conflicts
from torch import Tensor

import actscale_fast as af
from actscale_fast.architectures.layout import layout
from actscale_fast.frozen import shortcuts
from actscale_fast.learning.attribution import knock_out as passes
from actscale_fast.learning.engine import Engine

NEAR = {"rtol": 1e-5, "atol": 1e-6}  # float64 inside, float32 in the result
FLOAT32 = {"rtol": 1e-4, "atol": 2e-5}
#: Their attention takes the softmax of float64 scores in float32, where the mask is −inf: a padded token is NaN.
FLOAT32_SOFTMAX = {"bloom", "gemma2", "mpt"}


def words() -> Any:
    """A tokenizer of 61 words for the models of the zoo."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i:02}": i for i in range(61)}, unk_token="w03"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w03", pad_token="w00", eos_token="w02")


def sentences(*lengths: int) -> list[af.Example]:
    """Prompts of these lengths and two answers each."""
    generator = torch.Generator().manual_seed(7)
    examples = []
    for length in lengths:
        ids = torch.randint(4, 61, (length,), generator=generator).tolist()
        correct, wrong = (4 + torch.randperm(57, generator=generator)[:2]).tolist()
        examples.append(af.Example(" ".join(f"w{i:02}" for i in ids), f" w{correct:02}", f" w{wrong:02}"))
    return examples


@contextlib.contextmanager
def factors(model: Any, site: str, of_layer: Callable[[int, int], Tensor]) -> Iterator[None]:
    """Hooks that multiply a site by `of_layer(layer, tokens)` [T, H], or [T, 1] at a whole one."""
    found = layout(model)

    def scaled(x: Tensor, layer: int) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # of one prompt; OPT flattens rows and tokens itself
        factor = of_layer(layer, flat.shape[0]).to(x.dtype)
        return (flat.unflatten(-1, (factor.shape[1], -1)) * factor[..., None]).flatten(1).reshape(x.shape)

    def before(layer: int) -> Any:
        return lambda _, inputs: (scaled(inputs[0], layer), *inputs[1:])

    def after(layer: int) -> Any:
        return lambda _, __, output: (
            (scaled(output[0], layer), *output[1:]) if isinstance(output, tuple) else scaled(output, layer)
        )

    with contextlib.ExitStack() as stack:
        for layer in range(found.n_layers):
            module = found.site_module(site, layer)
            if site == "head":
                stack.callback(module.register_forward_pre_hook(before(layer)).remove)
            else:
                stack.callback(module.register_forward_hook(after(layer)).remove)
        yield


def plain_difference(
    model: Any, tokenizer: Any, examples: list[af.Example], site: str, alpha: Tensor, positions: list[int] | None
) -> Tensor:
    """The mean of z[c] − z[w] under y = h·(1 + alpha), alpha [layers, slots, heads], one prompt at a time."""

    def of_layer(layer: int, n_tokens: int) -> Tensor:
        if positions is None:
            return (1 + alpha[layer]).expand(n_tokens, -1)
        factor = torch.ones(n_tokens, alpha.shape[2], dtype=alpha.dtype)
        for slot, position in enumerate(positions):
            place = position + n_tokens if position < 0 else position
            if 0 <= place < n_tokens:
                factor = factor + torch.eye(n_tokens, dtype=alpha.dtype)[place][:, None] * alpha[layer, slot]
        return factor

    total = torch.zeros((), dtype=torch.float64)
    with factors(model, site, of_layer):
        for example in examples:
            ids = torch.tensor([tokenizer(example.prompt)["input_ids"]])
            correct, wrong = tokenizer.convert_tokens_to_ids([example.correct.strip(), example.wrong.strip()])
            z = model(input_ids=ids, use_cache=False).logits[0, -1]
            total = total + z[correct] - z[wrong]
    return total / len(examples)


def plain(
    model: Any, tokenizer: Any, examples: list[af.Example], site: str, positions: list[int] | None = None
) -> tuple[float, Tensor, Tensor]:
    """(the difference, its gradient, its change without each head), the latter from one forward pass for each head."""
    found = layout(model)
    shape = (found.n_layers, len(positions or [0]), found.n_heads if site == "head" else 1)
    alpha = torch.zeros(shape, dtype=torch.float64, requires_grad=True)

    def difference(value: Tensor) -> Tensor:
        return plain_difference(model, tokenizer, examples, site, value, positions)

    before = difference(alpha)
    (gradient,) = torch.autograd.grad(before, alpha)
    with torch.no_grad():
        one_hot = torch.eye(alpha.numel(), dtype=torch.float64).unflatten(1, shape)
        changes = torch.stack([difference(-part) - before for part in one_hot])
    return float(before.detach()), gradient, changes.view(shape)


def measured(model: Any, tokenizer: Any, examples: list[af.Example], **options: Any) -> af.Attribution:
    return af.attribution(model, tokenizer, examples, progress=False, **options)


def agree(result: af.Attribution, expected: tuple[float, Tensor, Tensor], near: dict[str, float] = NEAR) -> None:
    difference, gradient, changes = expected
    assert result.knock_out is not None
    assert result.logit_difference == pytest.approx(difference, rel=near["rtol"], abs=near["atol"])
    torch.testing.assert_close(result.scores, gradient.float(), **near)
    torch.testing.assert_close(result.knock_out, changes.float(), **near)
    assert gradient.any()
    assert changes.any()


@pytest.mark.parametrize("site", model_zoo.SITES)
def test_scores_are_the_gradient_and_knock_outs_one_forward_pass_each(site: str) -> None:
    model, tokenizer, examples = tiny.llama(dtype=torch.float64).requires_grad_(False), tiny.tokenizer(), conflicts(5)
    agree(measured(model, tokenizer, examples, site=site), plain(model, tokenizer, examples, site))


@pytest.mark.parametrize("site", ["head", "residual"])
def test_scores_are_finite_differences(site: str) -> None:
    # GPT-2's norms compute in float64 too; Llama's round to float32, which differences over 1e-5 would see.
    model, tokenizer, examples = model_zoo.tiny_model("gpt2", dtype=torch.float64), words(), sentences(4, 6, 6)
    scores = measured(model, tokenizer, examples, site=site, knock_out=False).scores
    step = 1e-5
    for place in [(0, 0, 0), (1, 0, scores.shape[2] - 1)]:
        alpha = torch.zeros(scores.shape, dtype=torch.float64)
        alpha[place] = step
        with torch.no_grad():
            ends = [plain_difference(model, tokenizer, examples, site, sign * alpha, None) for sign in (1, -1)]
        assert float(ends[0] - ends[1]) / (2 * step) == pytest.approx(float(scores[place]), rel=1e-5)


def zoo(family: str) -> tuple[Any, dict[str, float]]:
    """A model of the family that can be padded, and how near its results are."""
    wide = family not in FLOAT32_SOFTMAX
    model = model_zoo.tiny_model(family, dtype=torch.float64 if wide else torch.float32).requires_grad_(False)
    return model, NEAR if wide else FLOAT32


@pytest.mark.parametrize("family", sorted(model_zoo.CONFIGS))
def test_every_family_under_padding(family: str) -> None:
    (model, near), tokenizer, examples = zoo(family), words(), sentences(4, 6, 6, 9)
    agree(measured(model, tokenizer, examples), plain(model, tokenizer, examples, "head"), near)


@pytest.mark.parametrize("family", ["bloom", "gptj", "opt", "gemma2"])
def test_the_residual_stream_where_layers_return_tuples_or_flat_rows(family: str) -> None:
    (model, near), tokenizer, examples = zoo(family), words(), sentences(5, 7)
    expected = plain(model, tokenizer, examples, "residual")
    agree(measured(model, tokenizer, examples, site="residual"), expected, near)


@pytest.mark.parametrize("family", sorted(FLOAT32_SOFTMAX))
def test_these_families_in_float64_without_padding(family: str) -> None:
    model, tokenizer, examples = model_zoo.tiny_model(family, dtype=torch.float64), words(), sentences(6, 6)
    agree(measured(model, tokenizer, examples), plain(model, tokenizer, examples, "head"))


@pytest.mark.parametrize("site", model_zoo.SITES)
@pytest.mark.parametrize("positions", [[-1], [0, -2], [5, 3]])
def test_positions_count_from_each_prompts_own_ends(site: str, positions: list[int]) -> None:
    model, tokenizer, examples = tiny.llama(dtype=torch.float64).requires_grad_(False), tiny.tokenizer(), conflicts(4)
    expected = plain(model, tokenizer, examples, site, positions)
    agree(measured(model, tokenizer, examples, site=site, positions=positions), expected)


def test_a_position_that_no_prompt_has_changes_nothing() -> None:
    result = measured(tiny.llama(), tiny.tokenizer(), conflicts(4), positions=[40, -1])
    assert not result.scores[:, 0].any()
    assert result.knock_out is not None
    assert not result.knock_out[:, 0].any()
    assert result.knock_out[:, 1].all()


def test_chosen_layers_keep_their_order() -> None:
    every = measured(tiny.llama(), tiny.tokenizer(), conflicts(4))
    some = measured(tiny.llama(), tiny.tokenizer(), conflicts(4), layers=[-1, 0])
    torch.testing.assert_close(some.scores, every.scores[[2, 0]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(some.knock_out, every.knock_out[[2, 0]], rtol=1e-4, atol=1e-5)  # type: ignore[index]
    assert some.location.layers == (2, 0)
    assert {place.layer for place in some.top(8)} == {0, 2}


def counted(modules: dict[str, Any]) -> tuple[dict[str, int], contextlib.ExitStack]:
    counts = dict.fromkeys(modules, 0)
    stack = contextlib.ExitStack()
    for name, module in modules.items():

        def count(*_: Any, name: str = name) -> None:
            counts[name] += 1

        stack.callback(module.register_forward_pre_hook(count).remove)
    return counts, stack


def test_all_heads_of_a_layer_share_a_pass_that_starts_there() -> None:
    model = tiny.llama()
    examples = [example for example in conflicts(40) if len(example.prompt.split()) == 7][:6]
    counts, hooks = counted({"model": model} | {f"{i}": layer.mlp for i, layer in enumerate(model.model.layers)})
    with hooks:
        measured(model, tiny.tokenizer(), examples)
    # The head's check, the frozen pass with the gradient, and one pass a layer: not one for each of 12 heads.
    assert counts == {"model": 5, "0": 3, "1": 4, "2": 5}


def test_without_knock_outs_there_is_one_pass() -> None:
    model = tiny.llama()
    counts, hooks = counted({"model": model})
    with hooks:
        result = measured(model, tiny.tokenizer(), conflicts(6), knock_out=False, batch_size=6)
    assert result.knock_out is None
    assert result.agreement is None
    assert counts["model"] == 2


@pytest.mark.parametrize("bounds", [{"batch_size": 1}, {"cache_bytes": 0}, {"tokens": 30}, {"tokens": 1}])
def test_less_memory_gives_the_same(bounds: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = tiny.llama(dtype=torch.float64), conflicts(6)
    expected = measured(model, tiny.tokenizer(), examples, positions=[0, -1])
    tokens = bounds.pop("tokens", None)
    if tokens is not None:
        monkeypatch.setattr(passes, "PASS_TOKENS_CPU", tokens)
    found = measured(model, tiny.tokenizer(), examples, positions=[0, -1], **bounds)
    torch.testing.assert_close(found.scores, expected.scores, **NEAR)
    torch.testing.assert_close(found.knock_out, expected.knock_out, **NEAR)
    assert found.logit_difference == pytest.approx(expected.logit_difference, rel=1e-9)


def test_a_head_that_is_not_known_leaves_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = model_zoo.tiny_model("gemma2", dtype=torch.float64), sentences(6, 6)
    expected = measured(model, words(), examples)
    monkeypatch.setattr(shortcuts, "read_head", lambda *_: None)
    found = measured(model, words(), examples)
    torch.testing.assert_close(found.scores, expected.scores, **NEAR)
    torch.testing.assert_close(found.knock_out, expected.knock_out, **NEAR)


def test_an_objectives_scores_are_those_of_the_first_step_of_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[Tensor] = []
    original = Engine.gradients

    def recorded(self: Engine, requests: Any) -> Any:
        terms, found = original(self, requests)
        gradients.append(found[0].clone())
        return terms, found

    monkeypatch.setattr(Engine, "gradients", recorded)
    model, examples, objective = tiny.llama(), conflicts(6), af.Objective(margin=2.0)
    result = measured(model, tiny.tokenizer(), examples, objective=objective)
    scalars = af.ActivScalar.for_model(model)
    af.fit(model, tiny.tokenizer(), examples, scalars, objective, steps=1, batch_size=6, progress=False)
    torch.testing.assert_close(result.scores, gradients[-1])
    assert result.objective == objective
    assert result.agreement is None
    assert result.to_dict()["objective"]["margin"] == 2.0


def test_every_active_hinge_counts_the_score_once() -> None:
    model, examples = tiny.llama(), conflicts(6)
    scores = measured(model, tiny.tokenizer(), examples, knock_out=False).scores
    wide = af.Objective(margin=1e3)
    both = measured(model, tiny.tokenizer(), examples, objective=wide, knock_out=False, batch_size=2).scores
    one = measured(model, tiny.tokenizer(), examples, objective=replace(wide, directions=(1,)), knock_out=False).scores
    torch.testing.assert_close(both, -2 * scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one, -scores, rtol=1e-4, atol=1e-5)


def test_an_intervention_gives_its_place_and_keeps_its_values() -> None:
    model = tiny.llama()
    given = af.ActivScalar.for_model(model, layers=[1, 2], positions=[-1], generated=True)
    torch.nn.init.normal_(given.alpha)
    before = given.alpha.detach().clone()
    result = measured(model, tiny.tokenizer(), conflicts(4), intervention=given)
    expected = measured(model, tiny.tokenizer(), conflicts(4), layers=[1, 2], positions=[-1])
    assert torch.equal(given.alpha, before)
    assert given.alpha.grad is None
    torch.testing.assert_close(result.scores[:, :1], expected.scores)
    torch.testing.assert_close(result.knock_out[:, :1], expected.knock_out)  # type: ignore[index]
    assert not result.scores[:, 1].any()  # no example has generated tokens
    assert not result.knock_out[:, 1].any()  # type: ignore[index]


def state_of(model: Any) -> list[Any]:
    return [
        (name, type(module), module.training, sorted(module.__dict__), len(module._forward_hooks),
         len(module._forward_pre_hooks), [p.requires_grad for p in module.parameters(recurse=False)])
        for name, module in model.named_modules()
    ]  # fmt: skip


def test_the_model_is_left_as_it_was_also_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama().train()
    model.model.norm.requires_grad_(False)
    before = state_of(model)
    measured(model, tiny.tokenizer(), conflicts(4))
    assert state_of(model) == before

    def fails(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(passes.KnockOut, "_one_hot", fails)
    with pytest.raises(KeyboardInterrupt):
        measured(model, tiny.tokenizer(), conflicts(4))
    assert state_of(model) == before


def test_a_compiled_model_gives_the_same() -> None:
    model = tiny.llama()
    compiled = torch.compile(model, backend="eager")
    expected = measured(model, tiny.tokenizer(), conflicts(4))
    found = measured(compiled, tiny.tokenizer(), conflicts(4))
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.knock_out, expected.knock_out)  # type: ignore[arg-type]


def test_gradients_are_enabled_inside() -> None:
    model = tiny.llama()
    expected = measured(model, tiny.tokenizer(), conflicts(4), knock_out=False).scores
    with torch.no_grad():
        assert torch.equal(measured(model, tiny.tokenizer(), conflicts(4), knock_out=False).scores, expected)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="attribution needs gradients"):
        measured(model, tiny.tokenizer(), conflicts(4))


def test_bad_arguments_are_named() -> None:
    model, tokenizer, examples = tiny.llama(), tiny.tokenizer(), conflicts(2)
    scalars = af.ActivScalar.for_model(model)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"cache_bytes": -1}, ValueError, "cache_bytes: got -1"),
        ({"site": "mlp"}, ValueError, "site: got 'mlp'"),
        ({"layers": [9]}, ValueError, "layers: got 9"),
        ({"objective": 1.0}, TypeError, "objective: got float"),
        ({"intervention": scalars, "layers": [0]}, ValueError, "given together with site, layers or positions"),
        ({"intervention": af.SteerVec.for_model(model)}, TypeError, "intervention: got SteerVec"),
        ({"intervention": af.ActivScalar.for_model(tiny.llama(layers=2))}, ValueError, "made for another model"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            measured(model, tokenizer, examples, **options)


def result_of(scores: list[float], changes: list[float]) -> af.Attribution:
    """A result of one layer with these values of its heads."""
    location = af.ActivScalar.for_model(tiny.llama(layers=1)).location
    location = replace(location, model=replace(location.model, n_heads=len(scores)))
    return af.Attribution(torch.tensor([[scores]]), torch.tensor([[changes]]), location, 3, 0.5)


def test_the_agreement_is_of_minus_the_scores_with_the_changes() -> None:
    scores, changes = [1.0, -2.0, 0.5, 4.0, 0.5, 0.0, -3.0, 0.25], [-1.5, 1.0, 0.0, -3.0, -1.0, 0.0, 0.5, 0.0]
    found = result_of(scores, changes).agreement
    assert found is not None
    pair = torch.tensor([[-score for score in scores], changes], dtype=torch.float64)
    assert found.pearson == pytest.approx(float(torch.corrcoef(pair)[0, 1]), rel=1e-12)
    ranks = torch.tensor([[2.0, 7, 3.5, 1, 3.5, 6, 8, 5], [2, 8, 5, 1, 3, 5, 7, 5]], dtype=torch.float64)
    assert found.spearman == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), rel=1e-12)
    assert (found.n_top, found.overlap) == (2, 0.5)  # heads 3 and 6 by score, 3 and 0 by change
    perfect = result_of([1.0, 2.0, -3.0, 4.0], [-1.0, -2.0, 3.0, -4.0]).agreement
    assert perfect is not None
    assert perfect[:3] == pytest.approx((1.0, 1.0, 1.0), rel=1e-12)


def test_no_variation_has_no_correlation_and_is_null_in_json() -> None:
    result = result_of([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    found = result.agreement
    assert found is not None
    assert math.isnan(found.pearson)
    assert math.isnan(found.spearman)
    assert result.to_dict()["agreement"]["pearson"] is None
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_top_is_by_magnitude_with_its_places() -> None:
    result = result_of([1.0, -2.0, 0.5, 4.0], [-1.0, 0.0, 0.0, -3.0])
    assert [(place.head, place.score, place.knock_out) for place in result.top(3)] == [
        (3, 4.0, -3.0),
        (1, -2.0, 0.0),
        (0, 1.0, -1.0),
    ]
    assert len(result.top(9)) == 4
    spread = measured(tiny.llama(), tiny.tokenizer(), conflicts(3), layers=[2, 0], positions=[0, -1], knock_out=False)
    for place in spread.top(16):
        index = (spread.location.layers.index(place.layer), place.slot, place.head)
        assert place.score == float(spread.scores[index])
        assert place.knock_out is None


def test_the_dictionary_holds_everything() -> None:
    result = measured(tiny.llama(), tiny.tokenizer(), conflicts(3))
    data = json.loads(json.dumps(result.to_dict()))
    assert data["n_examples"] == 3
    assert torch.equal(torch.tensor(data["scores"]), result.scores)
    assert torch.equal(torch.tensor(data["knock_out"]), result.knock_out)  # type: ignore[arg-type]
    assert data["agreement"]["n_top"] == 3
    assert data["location"]["site"] == "head"
