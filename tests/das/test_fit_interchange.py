"""Learning and evaluating interchanges: a plain derivation, a planted variable, what is kept and what is refused."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from das_cases import exact, hooked
from model_zoo import randomised
from torch import Tensor

import actscale_fast as af
from actscale_fast import tasks
from actscale_fast.das.boundless_das import BoundlessDAS
from actscale_fast.das.fit_interchange import InterchangeResult, fit_interchange
from actscale_fast.das.sources import source_activations

#: The module; the package hands on its function of that name.
LEARNING = importlib.import_module("actscale_fast.das.fit_interchange")


def texts(n: int, seed: int) -> list[str]:
    """Prompts of 3 to 6 words, so that batches are padded."""
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(tiny.WORDS[4:], k=chosen.randint(3, 6))) for _ in range(n)]


def pairs(n: int, seed: int = 0) -> list[af.Example]:
    chosen = random.Random(seed)
    answers = [chosen.sample(["Paris", "Berlin", "Rome", "Oslo"], 2) for _ in range(n)]
    return [
        af.Example(base, f" {correct}", f" {wrong}", source=source)
        for base, source, (correct, wrong) in zip(texts(n, seed), texts(n, seed + 100), answers, strict=True)
    ]


def ids_of(text: str) -> Tensor:
    ids: Tensor = tiny.tokenizer()(text, return_tensors="pt")["input_ids"]
    return ids


def last_logits(model: Any, das: BoundlessDAS, base: str, source: Tensor, beta: float = 1.0, **changes: Any) -> Tensor:
    """Logits behind one base under hand-written hooks."""
    ids = ids_of(base)
    columns = [position % ids.shape[1] for position in das.location.positions or ()]
    with hooked(model, "llama", das, source[None], [columns], beta):
        logits: Tensor = model(ids).logits[0, -1]
    return logits


def plain_sources(model: Any, das: BoundlessDAS, sources: list[str]) -> Tensor:
    """[N, L, P, 1, D] at the site residual, from hooks, one source at a time."""
    rows = []
    for source in sources:
        seen: dict[int, Tensor] = {}
        handles = [
            model.model.layers[layer].register_forward_hook(
                lambda _, __, output, key=layer, kept=seen: kept.update({key: output})
            )
            for layer in das.location.layers
        ]
        with torch.no_grad():
            model(ids_of(source))
        for handle in handles:
            handle.remove()
        positions = list(das.location.positions or ())
        rows.append(torch.stack([seen[layer][0, positions] for layer in das.location.layers])[:, :, None])
    return torch.stack(rows)


def run(model: Any, examples: list[af.Example], das: BoundlessDAS, **options: Any) -> InterchangeResult:
    settings: dict[str, Any] = {"steps": 4, "batch_size": 5, "seed": 3, "progress": False, "rotation_lr": 0.01}
    return fit_interchange(model, tiny.tokenizer(), examples, das, **settings | options)


@pytest.mark.parametrize(("layers", "positions"), [([1], [-1]), ([0, 2], [-1, 1]), ([2], [-2])])
def test_steps_are_those_of_a_plain_loop(layers: list[int], positions: list[int]) -> None:
    model = tiny.llama(dtype=torch.float64).requires_grad_(False)
    examples = pairs(6)
    das, plain = (exact(BoundlessDAS.for_model(model, layers=layers, positions=positions, seed=1)) for _ in range(2))
    source = plain_sources(model, das, [example.source or "" for example in examples])
    result = run(model, examples, das, steps=5, batch_size=6, warmup=0.4, boundary_weight=0.5, temperature=(8.0, 1.0))
    rotations = [value for name, value in plain.named_parameters() if name != "boundary"]
    adam = torch.optim.Adam([{"params": rotations}, {"params": [plain.boundary]}])
    factors = [1 / 2, 1.0, 1.0, 2 / 3, 1 / 3]  # two steps up, three down
    for step, factor in enumerate(factors):
        plain.temperature.fill_(8.0 - step * 7 / 4)
        adam.param_groups[0]["lr"], adam.param_groups[1]["lr"] = 0.01 * factor, 0.01 * factor
        adam.zero_grad()
        entropies, hits = [], []
        for row, example in enumerate(examples):
            logits = last_logits(model, plain, example.prompt, source[row])
            answer = torch.tensor(tiny.WORDS.index(example.correct.strip()))
            entropies.append(F.cross_entropy(logits, answer))
            hits.append(float(logits.argmax() == answer))
        loss = torch.stack(entropies).mean() + 0.5 * plain.boundary.mean()
        loss.backward()
        adam.step()
        with torch.no_grad():
            plain.boundary.clamp_(1e-3, 1.0)
        record = result.history[step]
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-9)
        assert record["accuracy"] == pytest.approx(sum(hits) / len(hits))
        assert record["temperature"] == pytest.approx(8.0 - step * 7 / 4)
        assert record["lr"] == pytest.approx(0.01 * factor)
    assert result.intervention is das
    assert float(das.temperature) == 1.0
    torch.testing.assert_close(das.boundary, plain.boundary, rtol=0, atol=1e-8)
    torch.testing.assert_close(das.rotation, plain.rotation, rtol=0, atol=1e-6)


def test_accumulated_passes_make_the_same_step() -> None:
    model, found = tiny.llama(dtype=torch.float64), []
    for accumulate in (1, 3):
        das = exact(BoundlessDAS.for_model(model, layers=[1], positions=[-1]))
        found.append(run(model, pairs(8), das, batch_size=8, accumulate=accumulate))
    torch.testing.assert_close(found[0].intervention.rotation, found[1].intervention.rotation, rtol=0, atol=1e-7)
    assert [r["loss"] for r in found[0].history] == pytest.approx([r["loss"] for r in found[1].history])


def test_a_planted_variable_is_found() -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    planted, full, das = (BoundlessDAS.for_model(model, layers=[1], positions=[-1], seed=seed) for seed in (11, 1, 1))
    with torch.no_grad():  # half of the axes of a random rotation; and for comparison all of them
        planted.temperature.fill_(0.0)
        full.temperature.fill_(0.0)
        full.boundary.fill_(1.0)

    @torch.no_grad()
    def labelled(n: int, seed: int) -> list[af.Example]:
        """The answer is what the model says under the planted interchange."""
        bases, sources, made = texts(n, seed), texts(n, seed + 1), []
        states = source_activations(model, tokenizer, planted, sources)
        for row, (base, source) in enumerate(zip(bases, sources, strict=True)):
            with planted.interchange(states[row : row + 1]), af.patch(model, planted):
                answer = int(model(ids_of(base)).logits[0, -1].argmax())
            made.append(af.Example(base, f" {tiny.WORDS[answer]}", f" {tiny.WORDS[answer - 1]}", source=source))
        return made

    train, test = labelled(256, 20), labelled(96, 40)
    options = {"steps": 300, "batch_size": 32, "boundary_weight": 0.1, "temperature": (5.0, 0.1)}
    history = run(model, train, das, rotation_lr=0.05, **options).history
    first, last = (sum(r["cross_entropy"] for r in part) / 10 for part in (history[:10], history[-10:]))
    assert last < 0.6 * first
    nothing = BoundlessDAS.for_model(model, layers=[1], positions=[-1])
    nothing.paused = True
    found, whole, none = (_accuracy(model, each, test) for each in (das, full, nothing))  # on held-out pairs
    assert found > whole + 0.05
    assert found > none + 0.2


@torch.no_grad()
def _accuracy(model: Any, das: BoundlessDAS, examples: list[af.Example]) -> float:
    """The share of pairs whose most likely next token is the counterfactual one."""
    states = source_activations(model, tiny.tokenizer(), das, [example.source or "" for example in examples])
    hits = 0
    for row, example in enumerate(examples):
        with das.interchange(states[row : row + 1]), af.patch(model, das):
            hits += tiny.WORDS[int(model(ids_of(example.prompt)).logits[0, -1].argmax())] == example.correct.strip()
    return hits / len(examples)


def test_an_interrupted_fit_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples, path = tiny.llama(), pairs(9), tmp_path / "fit.safetensors"
    make = lambda: BoundlessDAS.for_model(model, layers=[1], positions=[-1])  # noqa: E731
    whole = run(model, examples, make(), steps=6)
    original, taken = LEARNING.InterchangeState.step, []

    def interrupted(self: Any, pairs: Any) -> None:
        if len(taken) == 4:
            raise KeyboardInterrupt
        taken.append(original(self, pairs))

    with monkeypatch.context() as context:
        context.setattr(LEARNING.InterchangeState, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, examples, make(), steps=6, checkpoint=path, checkpoint_every=3)
    resumed = run(model, examples, BoundlessDAS.for_model(model, layers=[1], positions=[-1], seed=9), steps=6,
                  checkpoint=path)  # fmt: skip
    assert resumed.history == whole.history
    assert torch.equal(resumed.intervention.rotation, whole.intervention.rotation)
    assert torch.equal(resumed.intervention.boundary, whole.intervention.boundary)
    assert float(resumed.intervention.temperature) == pytest.approx(0.1)
    again = run(model, examples, make(), steps=6, checkpoint=path)  # it is done: read, not run
    assert torch.equal(again.intervention.rotation, whole.intervention.rotation)
    with pytest.raises(ValueError, match=r"belongs to another fit: rotation|belongs to another fit: lr 0\.01, now"):
        run(model, examples, make(), steps=6, checkpoint=path, rotation_lr=0.02)
    others = [af.Example(e.prompt, e.correct, e.wrong, source=e.prompt) for e in examples]
    with pytest.raises(ValueError, match="belongs to another fit: examples"):
        run(model, others, make(), steps=6, checkpoint=path)


def test_epochs_count_the_steps_and_the_model_is_left_as_it_was() -> None:
    model = tiny.llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    das = BoundlessDAS.for_model(model, layers=[1], positions=[-1])
    result = run(model, pairs(9), das, steps=None, epochs=2, batch_size=4)
    assert len(result.history) == 2 * 3
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in das.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    boundary = [record["boundary"] for record in result.history]
    assert len(set(boundary)) == len(boundary)


def test_a_boundary_stays_within_its_bounds() -> None:
    model = tiny.llama()
    das = BoundlessDAS.for_model(model, layers=[1], positions=[-1])
    run(model, pairs(5), das, steps=6, boundary_lr=0.5, boundary_weight=100.0)
    assert das.boundary.item() == pytest.approx(1e-3)


def test_a_loss_that_is_not_finite_stops_the_fit_and_spoils_nothing() -> None:
    model = tiny.llama()
    das = BoundlessDAS.for_model(model, layers=[1], positions=[-1])
    before = das.rotation.clone()
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="step 0: the loss is nan"):
        run(model, pairs(5), das)
    assert torch.equal(das.rotation, before)
    assert das.boundary.item() == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0, expected a positive integer"),
        ({"steps": 0}, "steps: got 0, expected a positive integer"),
        ({"rotation_lr": -1.0}, r"lr: got -1\.0, expected a positive number"),
        ({"boundary_lr": 0}, "boundary_lr: got 0, expected a positive number"),
        ({"boundary_weight": -1}, "boundary_weight: got -1, expected a number >= 0"),
        ({"temperature": (50.0, 0.0)}, r"temperature: got \(50\.0, 0\.0\), expected two positive numbers"),
        ({"warmup": 1.0}, r"warmup: got 1\.0, expected a share of the steps"),
    ],
)
def test_settings_that_make_no_fit_are_refused(options: dict[str, Any], message: str) -> None:
    model = tiny.llama()
    with pytest.raises(ValueError, match=message):
        run(model, pairs(3), BoundlessDAS.for_model(model, layers=[1], positions=[-1]), **options)


def test_fit_and_fit_interchange_name_each_other() -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    das = BoundlessDAS.for_model(model, layers=[1], positions=[-1])
    with pytest.raises(TypeError, match="BoundlessDAS is learned by fit_interchange"):
        af.fit(model, tokenizer, pairs(3), das, steps=1, progress=False)
    with pytest.raises(TypeError, match="das: got ActivScalar, expected a BoundlessDAS"):
        run(model, pairs(3), af.ActivScalar.for_model(model))  # type: ignore[arg-type]
    with torch.inference_mode(), pytest.raises(RuntimeError, match="fit_interchange needs gradients"):
        run(model, pairs(3), das)


def test_examples_without_a_source_are_refused_by_row() -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    das = BoundlessDAS.for_model(model, layers=[1], positions=[-1])
    examples = [*pairs(2), af.Example("The capital", " Paris", " Rome")]
    for call in (lambda: run(model, examples, das), lambda: af.evaluate(model, tokenizer, examples, das)):
        with pytest.raises(ValueError, match="row 3 of examples has no source"):
            call()


def test_sources_are_read_at_the_positions_of_their_own_prompts() -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    das = BoundlessDAS.for_model(model, layers=[2, 0], positions=[-1, 1])
    wanted = [*texts(5, 7), "Q what is", "Q what is"]
    expected = plain_sources(model, das, wanted)
    with af.patch(model, das):  # itself no part of the frozen model
        found = source_activations(model, tokenizer, das, wanted, batch_size=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with das.interchange(found), af.patch(model, das), torch.no_grad():
        model(torch.ones(7, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("The capital", TypeError, "texts: got str, expected a list of strings"),
        ([], ValueError, "texts: got none, expected at least one"),
        (["The capital of", "The"], ValueError, "row 2 of texts: the source has 1 tokens, and so no position 1"),
        (["The capital of", 3], TypeError, "row 2 of texts: got int, expected a string"),
        ([" ".join(["The"] * 65)], ValueError, "row 1 of texts has 65 tokens, expected at most the model's 64"),
        ([""], ValueError, "row 1 of texts: '' has no tokens"),
    ],
)
def test_sources_that_a_model_cannot_read_are_refused(given: Any, error: type[Exception], message: str) -> None:
    model = tiny.llama()
    das = BoundlessDAS.for_model(model, layers=[0], positions=[-1, 1])
    with pytest.raises(error, match=message):
        source_activations(model, tiny.tokenizer(), das, given)


@torch.no_grad()
def test_an_evaluation_is_that_of_a_plain_derivation() -> None:
    model = tiny.llama()
    das = BoundlessDAS.for_model(model, layers=[0, 1], positions=[-1, 1])
    randomised(das, scale=0.3)
    das.boundary.fill_(0.6)
    das.temperature.fill_(1.0)
    examples = pairs(7)
    source = plain_sources(model, das, [example.source or "" for example in examples])
    result = af.evaluate(model, tiny.tokenizer(), examples, das, batch_size=3)
    differences: dict[float, list[float]] = {0.0: [], 1.0: [], -1.0: []}
    for row, example in enumerate(examples):
        c, w = (tiny.WORDS.index(answer.strip()) for answer in (example.correct, example.wrong))
        for beta, kept in differences.items():
            z = last_logits(model, das, example.prompt, source[row], beta)
            kept.append(float(z[c] - z[w]))
    table = {beta: torch.tensor(values) for beta, values in differences.items()}
    assert result.flip_to_correct == pytest.approx(float((table[1.0] > 0).float().mean()))
    assert result.flip_to_wrong == pytest.approx(float((table[-1.0] < 0).float().mean()))
    assert result.logit_difference == pytest.approx(float(table[1.0].mean()), abs=1e-4)
    assert result.logit_difference_inverted == pytest.approx(float(table[-1.0].mean()), abs=1e-4)
    assert result.baseline is not None
    assert result.baseline.flip_to_correct == pytest.approx(float((table[0.0] > 0).float().mean()))
    scaled = af.evaluate(model, tiny.tokenizer(), examples, 1.0 * das, batch_size=3)
    assert scaled.logit_difference == pytest.approx(result.logit_difference, abs=1e-6)


def test_other_interventions_ignore_sources() -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    scalars = randomised(af.ActivScalar.for_model(model))
    with_source = pairs(5)
    without = [af.Example(e.prompt, e.correct, e.wrong) for e in with_source]
    results = [af.evaluate(model, tokenizer, examples, scalars) for examples in (with_source, without)]
    assert results[0] == results[1]


def test_a_source_is_kept_in_the_file_where_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    examples = [*pairs(2), af.Example("The capital", " Paris", " Rome")]
    af.save_examples(path, examples)
    assert af.load_examples(path) == examples
    assert [sorted(json.loads(line)) for line in path.read_text().splitlines()] == [
        ["correct", "prompt", "source", "wrong"], ["correct", "prompt", "source", "wrong"],
        ["correct", "prompt", "wrong"],
    ]  # fmt: skip
    with pytest.raises(TypeError, match="source: got int, expected a string"):
        af.Example("p", " a", " b", source=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="source: got ' ', expected text"):
        af.Example("p", " a", " b", source=" ")


@pytest.mark.real_model
def test_on_the_real_model_the_order_of_names_is_found(demo_model: tuple[Any, Any]) -> None:
    model, tokenizer = demo_model
    train, test = tasks.name_order(tokenizer, n_train=128, n_test=48)
    das = BoundlessDAS.for_model(model, layers=[22], positions=[-1])
    history = fit_interchange(model, tokenizer, train, das, epochs=2, rotation_lr=5e-3, progress=False).history
    assert sum(r["loss"] for r in history[-5:]) < 0.75 * sum(r["loss"] for r in history[:5])
    result = af.evaluate(model, tokenizer, test, das)
    assert result.baseline is not None
    assert result.baseline.flip_to_correct < 0.6
    assert result.flip_to_correct > 0.7  # half of the axes of an unlearned rotation: 0.56
