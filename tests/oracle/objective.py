"""The objective of a fit from its formulas, on plain whole passes of one prompt at a time, without the package."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from actscale_fast.learning.encoded_examples import EncodedExamples
from actscale_fast.tasks.examples import Example

from .oracle import Oracle, call
from .subject import factors_of

CORRECT, WRONG_ANSWER = 10, 30
EXAMPLES = [
    Example("t5 t9 t12 t7", " t10", " t30"),
    Example("t8 t15", " t11", " t31"),
    Example("t4 t6 t10", " t12", " t32"),
]


class Examples(EncodedExamples):
    """Prompts that are token ids already; prompt n asks for token 10 + n and not for 30 + n."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.examples = []
        self.prompts = [list(prompt) for prompt in prompts]
        self.device = torch.device("cpu")
        self.pad_id = 0
        self.correct = torch.arange(CORRECT, CORRECT + len(prompts))
        self.wrong = torch.arange(WRONG_ANSWER, WRONG_ANSWER + len(prompts))


@functools.cache
def tokenizer() -> Any:
    """One word per token of the tiny vocabulary: "t5" is token 5."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"t{token}" for token in range(4, 61))]
    inner = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def full_objective(
    oracle: Oracle, intervention: Any, objective: Any, prompts: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """(E and F [2], the gradient of E + λ_F·F by the scalars), means over prompts, sums over directions."""
    location = intervention.location
    alpha = intervention.alpha.detach().double().requires_grad_()
    holder = _Holder(location, alpha)
    terms = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([list(prompt)])
        correct, wrong = CORRECT + number, WRONG_ANSWER + number
        with torch.no_grad():
            reference = call(oracle.model, ids)[0, -1].double()
        kept = torch.ones(reference.shape[0], dtype=torch.bool)
        kept[[correct, wrong]] = False
        slots = None if location.positions is None else _slots(location.positions, len(prompt))
        for sign in (1.0, -1.0):
            factors = holder.factors(oracle, sign, slots)
            with torch.enable_grad():
                z = oracle.logits(ids, location.site, factors)[0, -1].double()
                terms[0] = terms[0] + torch.relu(objective.margin - sign * (z[correct] - z[wrong]))
                p, q = reference[kept].log_softmax(-1), z[kept].log_softmax(-1)
                terms[1] = terms[1] + (p.exp() * (p - q)).sum()
    loss = (terms[0] + objective.faithfulness * terms[1]) / len(prompts)
    (gradient,) = torch.autograd.grad(loss, alpha)
    return torch.stack(terms).detach() / len(prompts), gradient


class _Holder:
    """Scalars that the oracle takes gradients of."""

    def __init__(self, location: Any, alpha: Tensor) -> None:
        self.location, self.alpha = location, alpha

    def factors(self, oracle: Oracle, strength: float, slots: list[int] | None) -> dict[int, Tensor]:
        with torch.enable_grad():
            return factors_of(self, oracle, strength, slots)


def _slots(positions: Sequence[int], length: int) -> list[int]:
    """Which listed position each token of a prompt is."""
    slots = [-1] * length
    for slot, position in enumerate(positions):
        index = position if position >= 0 else length + position
        if 0 <= index < length:
            slots[index] = slot
    return slots
