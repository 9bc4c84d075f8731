"""Evaluation against a plain derivation, and its identities."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from fit_cases import conflicts

import actscale_fast as af


def test_the_identity_changes_nothing() -> None:
    model = tiny.llama()
    result = af.evaluate(model, tiny.tokenizer(), conflicts(7), af.ActivScalar.for_model(model))
    assert result.kl == pytest.approx(0.0, abs=1e-6)  # batches of other sizes round differently
    assert result.n_active == 0
    assert result.n_scalars == 12
    assert result.baseline is not None
    assert result.flip_to_correct == result.baseline.flip_to_correct
    assert result.flip_to_correct + result.flip_to_wrong == pytest.approx(1.0)
    assert result.logit_difference == pytest.approx(result.logit_difference_inverted, abs=1e-6)


@torch.no_grad()
def test_every_field_is_that_of_a_plain_derivation() -> None:
    model, tokenizer, examples = tiny.llama(), tiny.tokenizer(), conflicts(7)
    scalars = af.ActivScalar.for_model(model)
    scalars.alpha.copy_(torch.randn(scalars.alpha.shape, generator=torch.Generator().manual_seed(1)))
    result = af.evaluate(model, tokenizer, examples, scalars, batch_size=3)
    differences, divergences, kept = {0: [], 1: [], -1: []}, {1: [], -1: []}, []
    weights = [layer.self_attn.o_proj.weight.clone() for layer in model.model.layers]
    for example in examples:
        ids = tokenizer(example.prompt, return_tensors="pt")["input_ids"]
        c, w = tokenizer.convert_tokens_to_ids([example.correct.strip(), example.wrong.strip()])
        others = [token for token in range(len(tiny.WORDS)) if token not in (c, w)]
        for beta in (0, 1, -1):
            for layer, weight, alpha in zip(model.model.layers, weights, scalars.alpha, strict=True):
                layer.self_attn.o_proj.weight.copy_(weight * (1 + beta * alpha.flatten()).repeat_interleave(8))
            z = model(ids).logits[0, -1]
            differences[beta].append(float(z[c] - z[w]))
            if beta == 0:
                reference = z[others].log_softmax(-1)
            else:
                log_q = z[others].log_softmax(-1)
                kept.append(float(log_q.argmax() == reference.argmax()))
                divergences[beta].append(float(F.kl_div(log_q, reference, log_target=True, reduction="sum")))
    table = {beta: torch.tensor(values) for beta, values in differences.items()}
    kl = {beta: float(torch.tensor(values).mean()) for beta, values in divergences.items()}
    expected = {
        "flip_to_correct": float((table[1] > 0).float().mean()),
        "flip_to_wrong": float((table[-1] < 0).float().mean()),
        "logit_difference": float(table[1].mean()),
        "logit_difference_inverted": float(table[-1].mean()),
        "kl_correct": kl[1],
        "kl_wrong": kl[-1],
        "kl": (kl[1] + kl[-1]) / 2,
        "top1": sum(kept) / len(kept),
        "l1": float(scalars.alpha.abs().sum()),
    }
    for name, value in expected.items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert result.baseline.flip_to_correct == pytest.approx(float((table[0] > 0).float().mean()))
    assert result.n_active == 12


def test_rows_and_dict_say_what_the_fields_say() -> None:
    model = tiny.llama()
    result = af.evaluate(model, tiny.tokenizer(), conflicts(4), af.ActivScalar.for_model(model))
    rows = {label: (before, after) for label, before, after in result.rows()}
    assert rows["correct above wrong, β = +1"] == (f"{result.flip_to_correct:.2f}",) * 2
    assert result.to_dict()["baseline"]["n_examples"] == 4


def test_an_intervention_of_another_model_is_refused() -> None:
    scalars = af.ActivScalar.for_model(tiny.llama(layers=2))
    with pytest.raises(ValueError, match="layers"):
        af.evaluate(tiny.llama(), tiny.tokenizer(), conflicts(2), scalars)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        af.evaluate(tiny.llama(), tiny.tokenizer(), conflicts(2), scalars, batch_size=0)
