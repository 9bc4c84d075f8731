"""Answers of several tokens, in any script, against plain forward passes one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import answer_cases as plain
import model_zoo
import pytest
import tiny
import torch
from fit_cases import conflicts
from torch import Tensor

import actscale_fast as af
from actscale_fast.frozen import shortcuts
from actscale_fast.learning.encoded_examples import EncodedExamples
from actscale_fast.learning.engine import Engine, FitRequest, engine
from actscale_fast.learning.engine.microbatches import MicrobatchPlanner, RequestedPrompt
from actscale_fast.learning.engine.step_runner import STRATEGIES, Strategy
from actscale_fast.learning.execution import Execution

#: Prompts and answers of different lengths: several tokens against one and against several, a common beginning, one
#: token each, and one answer that the other one's first token also begins.
EXAMPLES = [
    af.Example("The capital of A is", " Paris one", " Rome"),
    af.Example("Q Q The capital of B is", " Madrid one two", " Madrid three"),
    af.Example("Q Q is", " Paris", " Rome"),
    af.Example("is", " one two three four", " Oslo Berlin"),
    af.Example("The capital of C is what answer", " Berlin Rome", " Berlin Oslo six"),
]
OBJECTIVE = af.Objective(margin=6.0, faithfulness=0.7)
NEAR = {"rtol": 1e-6, "atol": 1e-6}


def model_of(seed: int = 0) -> Any:
    return tiny.llama(seed, dtype=torch.float64).requires_grad_(False)


def scalars_of(model: Any, size: float = 0.5, **options: Any) -> af.ActivScalar:
    scalars = af.ActivScalar.for_model(model, **options)
    with torch.no_grad():
        scalars.alpha.copy_(size * torch.randn(scalars.alpha.shape, generator=torch.Generator().manual_seed(5)))
    return scalars


def engine_step(
    model: Any, tokenizer: Any, examples: Sequence[af.Example], scalars: af.ActivScalar, objective: af.Objective,
    **options: Any,
) -> tuple[Tensor, Tensor, bool]:  # fmt: skip
    """(E and F, the gradient, whether rows were packed), from one step of an engine."""
    data = EncodedExamples(examples, tokenizer, model)
    requests = [FitRequest(range(len(data)), objective)]
    with Engine(model, data, scalars, [objective], Execution(**options)) as opened:
        terms, (gradient,) = opened.gradients(requests)
        packs = opened.runner.planner.packs
    return terms[0, :2].double(), gradient.double(), packs


def agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=tolerance * float(expected[1].abs().max()))
    assert expected[1].any()


@pytest.fixture(params=["packed", "one row per answer"])
def packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    wanted = request.param == "packed"
    monkeypatch.setattr(
        MicrobatchPlanner, "cost", lambda self, part, weight: 0 if bool(part[0].tree) is wanted else 1e9
    )
    return wanted


@pytest.mark.parametrize(
    "objective",
    [
        OBJECTIVE,
        replace(OBJECTIVE, kl="reverse", directions=(-1,)),
        replace(OBJECTIVE, exclude_answers=False, margin=40.0),
    ],
)
def test_a_step_is_that_of_plain_passes(objective: af.Objective, packing: bool) -> None:
    model, tokenizer = model_of(), tiny.tokenizer()
    scalars = scalars_of(model)
    terms, gradient, packs = engine_step(model, tokenizer, EXAMPLES, scalars, objective)
    assert packs
    agree((terms, gradient), plain.step(model, plain.tokens_of(tokenizer, EXAMPLES), scalars.alpha, objective))


@pytest.mark.parametrize(
    ("positions", "generated"), [([-1], False), ([-1], True), ([0, -2], False), ([0, -2], True), ([], True)]
)
def test_positions_are_those_of_the_prompt_and_answers_are_generated(positions: list[int], generated: bool) -> None:
    model, tokenizer = model_of(), tiny.tokenizer()
    scalars = scalars_of(model, positions=positions, generated=generated)
    terms, gradient, packs = engine_step(model, tokenizer, EXAMPLES, scalars, OBJECTIVE)
    assert not packs
    expected = plain.step(model, plain.tokens_of(tokenizer, EXAMPLES), scalars.alpha, OBJECTIVE, positions, generated)
    agree((terms, gradient), expected)
    if generated:
        assert gradient[:, -1].any()


@pytest.mark.parametrize("layers", [[2], [0, 1]])
def test_layers_that_are_shared_or_constant_change_nothing(layers: list[int]) -> None:
    model, tokenizer = model_of(), tiny.tokenizer()
    scalars = scalars_of(model, layers=layers)
    with torch.no_grad():
        scalars.alpha[0] = 0.0  # the directions share everything below the layer after it
    terms, gradient, _ = engine_step(model, tokenizer, EXAMPLES, scalars, OBJECTIVE)
    alpha = torch.zeros(3, 1, 4)
    alpha[layers] = scalars.alpha.detach()
    expected, whole = plain.step(model, plain.tokens_of(tokenizer, EXAMPLES), alpha, OBJECTIVE)
    agree((terms, gradient), (expected, whole[layers]))


@pytest.mark.parametrize("options", [{"accumulate": 3}, {"memory_bytes": 1}, {"cache_bytes": 0}])
def test_less_memory_gives_the_same(options: dict[str, int]) -> None:
    model, tokenizer = model_of(), tiny.tokenizer()
    scalars = scalars_of(model)
    terms, gradient, _ = engine_step(model, tokenizer, EXAMPLES, scalars, OBJECTIVE, **options)
    agree((terms, gradient), plain.step(model, plain.tokens_of(tokenizer, EXAMPLES), scalars.alpha, OBJECTIVE))


def test_a_head_that_is_not_known_leaves_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_of(), tiny.tokenizer()
    scalars = scalars_of(model)
    expected = plain.step(model, plain.tokens_of(tokenizer, EXAMPLES), scalars.alpha, OBJECTIVE)
    monkeypatch.setattr(shortcuts, "read_head", lambda *_: None)
    terms, gradient, _ = engine_step(model, tokenizer, EXAMPLES, scalars, OBJECTIVE)
    agree((terms, gradient), expected)


@pytest.mark.parametrize("strategy", STRATEGIES[1:], ids=lambda strategy: strategy.name)
def test_slower_strategies_give_the_same(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_of(), tiny.tokenizer()
    scalars = scalars_of(model, positions=[-1], generated=True)
    monkeypatch.setattr(engine, "STRATEGIES", (strategy,))
    terms, gradient, _ = engine_step(model, tokenizer, EXAMPLES, scalars, OBJECTIVE)
    expected = plain.step(model, plain.tokens_of(tokenizer, EXAMPLES), scalars.alpha, OBJECTIVE, [-1], True)
    agree((terms, gradient), expected)


def test_a_composite_beside_another_patch_of_the_caller() -> None:
    model, tokenizer = model_of(), tiny.tokenizer()
    first, second, other = (scalars_of(model, layers=[layer], positions=[-1, 0][: layer + 1]) for layer in range(3))
    whole = scalars_of(model, positions=[-1])
    with torch.no_grad():
        whole.alpha[0] = first.alpha[0]
        whole.alpha[1:] = 0.0
    with af.patch(model, other):
        composite = af.evaluate(model, tokenizer, EXAMPLES, first + second * 0.0)
        single = af.evaluate(model, tokenizer, EXAMPLES, whole)
    assert composite.logit_difference == pytest.approx(single.logit_difference, rel=1e-6)
    assert single.baseline is not None
    assert composite.baseline is not None
    assert composite.baseline.logit_difference == pytest.approx(single.baseline.logit_difference, rel=1e-6)
    tokens = plain.tokens_of(tokenizer, EXAMPLES)
    alpha = torch.zeros(3, 2, 4, dtype=torch.float64)
    alpha[2] = other.alpha.detach()[0]
    expected = [float(plain.predicted(model, one, alpha, 1.0, [-1, 0])[1]) for one in tokens]
    assert single.baseline.logit_difference == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def test_prompts_of_one_length_where_the_model_cannot_be_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_of(), tiny.tokenizer()
    scalars = scalars_of(model)
    monkeypatch.setattr(EncodedExamples, "pads", property(lambda _: False))
    terms, gradient, _ = engine_step(model, tokenizer, EXAMPLES, scalars, OBJECTIVE)
    agree((terms, gradient), plain.step(model, plain.tokens_of(tokenizer, EXAMPLES), scalars.alpha, OBJECTIVE))


def zoo_words() -> Any:
    """A tokenizer of 61 words for the models of the zoo."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i:02}": i for i in range(61)}, unk_token="w03"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w03", pad_token="w00", eos_token="w02")


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "cohere"])
def test_soft_caps_learned_positions_and_scaled_logits(family: str) -> None:
    model, tokenizer = model_zoo.tiny_model(family, dtype=torch.float64).requires_grad_(False), zoo_words()
    # Gemma 2 takes the softmax of its scores in float32, where the mask of padded float64 scores is −inf: one length.
    prompts = ["w10 w11 w12 w13", "w20 w21 w22 w23"] if family == "gemma2" else ["w10 w11", "w20 w21 w22 w23 w24"]
    examples = [af.Example(prompts[0], " w30 w31 w32", " w33"), af.Example(prompts[1], " w40 w41", " w40 w42 w43")]
    scalars = scalars_of(model)
    terms, gradient, _ = engine_step(model, tokenizer, examples, scalars, OBJECTIVE)
    expected = plain.step(model, plain.tokens_of(tokenizer, examples), scalars.alpha, OBJECTIVE)
    agree((terms, gradient), expected)


def test_every_figure_of_an_evaluation() -> None:
    model, tokenizer = model_of(), tiny.tokenizer()
    scalars = scalars_of(model)
    tokens, table, kl, kept = plain.tokens_of(tokenizer, EXAMPLES), {0: [], 1: [], -1: []}, {1: [], -1: []}, []
    alpha = scalars.alpha.detach().double()
    for one in tokens:
        reference, before = plain.predicted(model, one, alpha, 0.0)
        table[0].append(float(before))
        others = [token for token in range(len(reference)) if token not in (one.correct[0], one.wrong[0])]
        for sign in (1, -1):
            z, difference = plain.predicted(model, one, alpha, float(sign))
            table[sign].append(float(difference))
            kl[sign].append(float(plain.divergence(z, reference, one, OBJECTIVE)))
            kept.append(bool(z[others].argmax() == reference[others].argmax()))
    found = af.evaluate(model, tokenizer, EXAMPLES, scalars, batch_size=3)
    n = len(EXAMPLES)
    assert found.logit_difference == pytest.approx(sum(table[1]) / n, rel=1e-6)
    assert found.logit_difference_inverted == pytest.approx(sum(table[-1]) / n, rel=1e-6)
    assert found.baseline is not None
    assert found.baseline.logit_difference == pytest.approx(sum(table[0]) / n, rel=1e-6)
    assert found.flip_to_correct == sum(value > 0 for value in table[1]) / n
    assert found.flip_to_wrong == sum(value < 0 for value in table[-1]) / n
    assert found.kl_correct == pytest.approx(sum(kl[1]) / n, rel=1e-6)
    assert found.kl_wrong == pytest.approx(sum(kl[-1]) / n, rel=1e-6)
    assert found.top1 == sum(kept) / (2 * n)


@pytest.mark.parametrize("positions", [None, [-1]])
def test_attribution_is_the_gradient_and_knock_outs_are_passes(positions: list[int] | None) -> None:
    model, tokenizer = model_of(), tiny.tokenizer()
    place = af.ActivScalar.for_model(model, positions=positions, generated=positions is not None)
    generated = place.location.generated
    tokens = plain.tokens_of(tokenizer, EXAMPLES)

    def difference(value: Tensor) -> Tensor:
        found = [plain.predicted(model, one, value, 1.0, positions, generated)[1] for one in tokens]
        return torch.stack(found).mean()

    zero = torch.zeros(place.alpha.shape, dtype=torch.float64, requires_grad=True)
    before = difference(zero)
    (gradient,) = torch.autograd.grad(before, zero)
    with torch.no_grad():
        one_hot = torch.eye(zero.numel(), dtype=torch.float64).unflatten(1, zero.shape)
        changes = torch.stack([difference(-one) - before for one in one_hot]).view(zero.shape)
    found = af.attribution(model, tokenizer, EXAMPLES, intervention=place, batch_size=2, progress=False)
    assert found.logit_difference == pytest.approx(float(before.detach()), rel=1e-6)
    torch.testing.assert_close(found.scores, gradient.float(), **NEAR)
    assert found.knock_out is not None
    torch.testing.assert_close(found.knock_out, changes.float(), **NEAR)


@torch.no_grad()
def test_an_evaluation_and_generate_steer_the_same_tokens() -> None:
    model, tokenizer = model_of(), tiny.tokenizer()
    scalars = scalars_of(model, size=1.0, positions=[1, -1], generated=True)
    prompt = "Q The capital of B is"
    ids = tokenizer(prompt, return_tensors="pt")
    with af.patch(model, scalars):
        out = model.generate(
            **ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True,
            eos_token_id=None, bad_words_ids=[[0], [1], [2], [3]],
        )  # fmt: skip
    log_p = torch.stack(out.logits, 1)[0].double().log_softmax(-1)  # [4, V]
    generated = out.sequences[0, ids["input_ids"].shape[1] :]
    own = float(log_p.gather(1, generated[:, None]).sum())
    other = next(token for token in range(4, 26) if token != generated[0])
    example = af.Example(prompt, " " + tokenizer.decode(generated), f" {tiny.WORDS[other]}")
    found = af.evaluate(model, tokenizer, [example], scalars)
    assert found.logit_difference == pytest.approx(own - float(log_p[0, other]), rel=1e-6)


def test_a_sweep_fits_as_fits_do_alone() -> None:
    model, tokenizer, weights = model_of(), tiny.tokenizer(), [0.2, 0.02]
    shared: dict[str, Any] = {"steps": 4, "lr": 0.05, "batch_size": 3, "seed": 1, "progress": False}
    swept = af.sweep(model, tokenizer, EXAMPLES, {"minimality": weights}, objective=OBJECTIVE, **shared)
    for weight, one in zip(weights, swept.fits, strict=True):
        alone = af.ActivScalar.for_model(model)
        af.fit(model, tokenizer, EXAMPLES, alone, replace(OBJECTIVE, minimality=weight), **shared)
        torch.testing.assert_close(one.intervention.alpha, alone.alpha, rtol=1e-4, atol=1e-5)
    assert af.minimality_path(model, tokenizer, EXAMPLES, 2, objective=OBJECTIVE, steps=2)[0] > 0


def test_a_fit_raises_the_margin_of_whole_answers() -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    scalars = af.ActivScalar.for_model(model)
    objective = af.Objective(margin=20.0, faithfulness=0.0, minimality=0.0)
    af.fit(model, tokenizer, EXAMPLES, scalars, objective, steps=25, lr=0.1, batch_size=5, progress=False)
    found = af.evaluate(model, tokenizer, EXAMPLES, scalars)
    assert found.baseline is not None
    assert found.logit_difference > found.baseline.logit_difference + 1
    assert found.logit_difference_inverted < found.baseline.logit_difference - 1


def test_the_slot_of_generated_tokens_is_learned_from_long_answers_alone() -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    scalars = af.ActivScalar.for_model(model, positions=[], generated=True)
    af.fit(model, tokenizer, EXAMPLES, scalars, af.Objective(minimality=0.0), steps=2, progress=False)
    assert scalars.alpha.any()


def test_answers_of_one_token_take_the_path_of_single_tokens_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)  # several would split the frozen pass by its rows, of which the mixed data has one more
    model, tokenizer, singles = tiny.llama(), tiny.tokenizer(), conflicts(6)
    data, mixed = (EncodedExamples(some, tokenizer, model) for some in (singles, [*singles, EXAMPLES[0]]))
    assert data.long_answers == {}
    assert mixed.long_answers.keys() == {6}
    requests = [FitRequest(range(6), OBJECTIVE)]
    found = []
    for one in (data, mixed):
        scalars = scalars_of(model)
        with Engine(model, one, scalars, [OBJECTIVE]) as opened:
            planner = opened.runner.planner
            monkeypatch.setattr(planner, "max_tokens", 1024)
            found.append(opened.gradients(requests))
            parts = planner.microbatches([RequestedPrompt(0, row) for row in range(6)], requests)
            assert not any(opened.runner.collator.collate(rows, requests).shape.answered for rows in parts)
    (terms, gradients), (others, other_gradients) = found
    assert torch.equal(terms, others)
    assert torch.equal(gradients[0], other_gradients[0])


def bytes_tokenizer() -> Any:
    """One token per byte, as byte-level tokenizers split rare scripts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<pad>", *alphabet])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")


def byte_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=96, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


def test_answers_in_any_script(recwarn: pytest.WarningsRecorder) -> None:
    model, tokenizer = byte_llama(), bytes_tokenizer()
    examples = [
        af.Example("日本の首都は", "東", "杲"),  # the first two of their three bytes are the same
        af.Example("Столица это", " Минск", " Рим"),
        af.Example("Ethiopia:", " Addis Ababa", " X"),
    ]
    assert [len(one.correct) for one in plain.tokens_of(tokenizer, examples)] == [3, 11, 12]
    scalars = scalars_of(model)
    terms, gradient, _ = engine_step(model, tokenizer, examples, scalars, OBJECTIVE)
    agree((terms, gradient), plain.step(model, plain.tokens_of(tokenizer, examples), scalars.alpha, OBJECTIVE))
    assert not [warning for warning in recwarn if "leading space" in str(warning.message)]


@pytest.mark.parametrize(
    ("correct", "wrong", "message"),
    [
        (
            " Paris Rome",
            " Paris",
            r"row 1 of examples: the tokens of correct ' Paris Rome' begin with all those of wrong ' Paris'",
        ),
        (
            " Rome",
            " Rome Oslo",
            r"row 1 of examples: the tokens of wrong ' Rome Oslo' begin with all those of correct ' Rome'",
        ),
        (
            " Rome Oslo",
            "  Rome  Oslo",
            r"row 1 of examples: correct ' Rome Oslo' and wrong .* are the same 2 tokens",
        ),
        (
            " Rome Nowhere",
            " Paris",
            r"row 1 of examples, correct: ' Rome Nowhere' has a part that is not a token",
        ),
        (" Rome", " Paris" * 65, "longest answer of several tokens has 69 tokens, expected at most the model's 64"),
    ],
)
def test_answers_that_cannot_be_compared_are_refused(correct: str, wrong: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncodedExamples([af.Example("The capital of A is", correct, wrong)], tiny.tokenizer(), tiny.llama())


def test_a_missing_space_is_suggested_only_where_it_helps() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["ĠR", "ĠRo", "ĠRom", "ĠO", "ĠOs", "ĠOsl"]
    merges = [("Ġ", "R"), ("ĠR", "o"), ("ĠRo", "m"), ("Ġ", "O"), ("ĠO", "s"), ("ĠOs", "l")]
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*alphabet, *pieces])}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    model = byte_llama()
    model.resize_token_embeddings(len(tokenizer))
    expected = r"row 1 of examples, correct: 'Rom' is 3 tokens .* and ' Rom' is 1; did you mean it with .* \(and 1"
    with pytest.warns(UserWarning, match=expected):
        EncodedExamples([af.Example("The capital is", "Rom", "Osl")], tokenizer, model)


def test_what_reads_the_next_token_alone_refuses_long_answers() -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    example = replace(EXAMPLES[0], source="The capital of B is")
    das = af.BoundlessDAS.for_model(model, layers=[1], positions=[-1])
    with pytest.raises(ValueError, match=r"row 1 of examples has an answer of several .* fit_interchange learns"):
        af.fit_interchange(model, tokenizer, [example], das, steps=1, progress=False)
    with pytest.raises(ValueError, match=r"row 1 of examples has an answer of several .* BoundlessDAS is eval"):
        af.evaluate(model, tokenizer, [example], das)
    probe = af.DynScalar.for_model(model)
    with pytest.raises(ValueError, match="several tokens, but sparsity='scalars' is a mean over"):
        af.fit(model, tokenizer, [example], probe, af.Objective(sparsity="scalars"), steps=1, progress=False)
    scalars = af.ActivScalar.for_model(model)
    with pytest.raises(ValueError, match="several tokens, but capture=True"):
        af.fit(model, tokenizer, [example], scalars, steps=1, capture=True, progress=False)
