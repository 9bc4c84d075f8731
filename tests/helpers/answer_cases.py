"""Answers of several tokens from plain forward passes: one sequence at a time, hooks, logits and log_softmax."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import actscale_fast as af
from actscale_fast.architectures.layout import layout


@dataclass(frozen=True)
class Tokens:
    """An example as token ids."""

    prompt: list[int]
    correct: list[int]
    wrong: list[int]


def tokens_of(tokenizer: Any, examples: Sequence[af.Example]) -> list[Tokens]:
    found = []
    for example in examples:
        prompt = tokenizer(example.prompt)["input_ids"]
        ends = [
            tokenizer(example.prompt + answer)["input_ids"][len(prompt) :]
            for answer in (example.correct, example.wrong)
        ]
        found.append(Tokens(prompt, *ends))
    return found


def factors(
    alpha: Tensor, beta: float, n_prompt: int, n_tokens: int, positions: list[int] | None, generated: bool
) -> Tensor:
    """1 + β·α of each layer, token and head [L, T, H], for alpha [L, slots, H]."""
    scale = torch.ones(alpha.shape[0], n_tokens, alpha.shape[2], dtype=torch.float64)
    for token in range(n_tokens):
        slot = None if positions is not None else 0
        for number, position in enumerate(positions or []):
            if slot is None and token == (position if position >= 0 else n_prompt + position):
                slot = number
        if token >= n_prompt and positions is not None:
            slot = len(positions) if generated else None
        if slot is not None:
            scale = scale.clone()
            scale[:, token] = scale[:, token] + beta * alpha[:, slot]
    return scale


@contextlib.contextmanager
def scaled(model: Any, scale: Tensor) -> Iterator[None]:
    """Multiply the heads of each layer and token of one sequence by scale [L, T, H]."""
    found = layout(model)

    def before(layer: int) -> Callable[..., Any]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            heads = inputs[0].unflatten(-1, (scale.shape[2], -1))
            return ((heads * scale[layer].to(heads.dtype)[..., None]).flatten(-2), *inputs[1:])

        return hook

    with contextlib.ExitStack() as stack:
        for layer in range(found.n_layers):
            stack.callback(found.site_module("head", layer).register_forward_pre_hook(before(layer)).remove)
        yield


def predicted(
    model: Any, one: Tokens, alpha: Tensor, beta: float, positions: list[int] | None = None, generated: bool = False
) -> tuple[Tensor, Tensor]:
    """(the next token's logits after the prompt [V], log p(correct) − log p(wrong)), in float64."""
    sums = []
    for answer in (one.correct, one.wrong):
        ids = [*one.prompt, *answer]
        with scaled(model, factors(alpha, beta, len(one.prompt), len(ids), positions, generated)):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
        log_p = logits.log_softmax(-1)
        sums.append(sum(log_p[len(one.prompt) - 1 + t, token] for t, token in enumerate(answer)))
        first = logits[len(one.prompt) - 1]
    return first, sums[0] - sums[1]


def divergence(z: Tensor, reference: Tensor, one: Tokens, objective: af.Objective) -> Tensor:
    kept = torch.ones(len(z), dtype=torch.bool)
    if objective.exclude_answers:
        kept[[one.correct[0], one.wrong[0]]] = False
    p, q = reference[kept].log_softmax(-1), z[kept].log_softmax(-1)
    if objective.kl == "reverse":
        p, q = q, p
    return (p.exp() * (p - q)).sum()


def step(
    model: Any, examples: Sequence[Tokens], alpha: Tensor, objective: af.Objective,
    positions: list[int] | None = None, generated: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(E and F [2], the gradient of E + λ_F·F by α), means over the examples."""
    alpha = alpha.detach().double().requires_grad_()
    terms = [torch.zeros((), dtype=torch.float64)] * 2
    for one in examples:
        reference = predicted(model, one, alpha, 0.0, positions, generated)[0].detach()
        for sign in objective.directions:
            z, difference = predicted(model, one, alpha, float(sign), positions, generated)
            terms[0] = terms[0] + torch.relu(objective.margin - sign * difference)
            terms[1] = terms[1] + divergence(z, reference, one, objective)
    loss = (terms[0] + objective.faithfulness * terms[1]) / len(examples)
    (gradient,) = torch.autograd.grad(loss, alpha)
    return torch.stack(terms).detach() / len(examples), gradient
