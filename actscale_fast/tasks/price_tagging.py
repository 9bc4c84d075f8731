"""Pairs for interchange interventions on a price-tagging game: is a cost within a bracket?

The causal model (after arXiv 2305.08809, section 4; the wording and the pairs are ours):

    P = cost ≥ lower bound        Q = cost ≤ upper bound        answer = yes if P and Q, else no

An interchange sets one of the two variables of the base to its value in the source. A model that keeps the variable in
a subspace of its activations gives the counterfactual answer when that subspace is taken from the source.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Literal

from .examples import Example
from .split import TaskSplit, answer_tokens, check_sizes, distinct, prompt_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRICE_TEMPLATE = (
    "Say yes if the cost is between {lower} and {upper} dollars, otherwise no. Cost: {cost} dollars. Answer:"
)

_BOUNDS = range(100, 950, 50)  # in cents
_WIDTHS = range(250, 751)  # of a bracket
_HIGHEST = 999
#: (where the base's cost is, where the source's is) for P; the answers alternate between yes and no. For each of the
#: two, the base's own answer is right every second time, and so is the source's: keeping or copying it does not help.
_CELLS = (
    ("within", "within"), ("within", "below"), ("within", "above"), ("above", "within"),
    ("below", "within"), ("within", "below"), ("below", "above"), ("above", "within"),
)  # fmt: skip
_MIRROR = {"below": "above", "above": "below", "within": "within"}
Variable = Literal["lower", "upper"]


def price_tagging(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_train: int = 512,
    n_test: int = 128,
    seed: int = 0,
    variable: Variable = "lower",
) -> TaskSplit:
    """Bases and sources of the price-tagging game; held-out pairs use other brackets.

    Half of the counterfactual answers are yes and half are no; in half of the pairs with each, the base's own answer is
    the same, and likewise the source's. All prompts have the same number of tokens. The model must be able to play the
    game: that of the paper is an instruction-tuned 7B model. SmolLM2-135M-Instruct says no to nearly all prompts; see
    `name_order` for a game that it plays.

    Args:
        tokenizer: decides which amounts give prompts of one length; " yes" and " no" must be single tokens.
        n_train, n_test: number of training and held-out pairs.
        seed: the same seed gives the same pairs in the same order.
        variable: the variable to interchange: "lower" (cost ≥ lower bound) or "upper" (cost ≤ upper bound).

    Returns:
        TaskSplit of examples with a source: `correct` is the counterfactual answer, `wrong` the other one.

    Raises:
        TypeError, ValueError: a count below 1, an unknown variable, or a tokenizer that splits the answers.

    Example::

        train, test = price_tagging(tokenizer)
        das = BoundlessDAS.for_model(model, layers=[15], positions=[-1])
        fit_interchange(model, tokenizer, train, das)
    """
    check_sizes(n_train, n_test)
    if variable not in ("lower", "upper"):
        raise ValueError(f"variable: got {variable!r}, expected 'lower' or 'upper'")
    split = [word for word, tokens in answer_tokens(tokenizer, ("yes", "no")).items() if len(tokens) != 1]
    if split:
        raise ValueError(f"tokenizer: {' and '.join(split)} must be single tokens behind a space")
    rng = random.Random(seed)
    brackets = [(lower, upper) for lower in _BOUNDS for upper in _BOUNDS if upper - lower in _WIDTHS]
    length = prompt_lengths(tokenizer, [_prompt(brackets[0], 234)])[0]
    rng.shuffle(brackets)
    held_out = round(0.3 * len(brackets))
    sides = []
    for wanted, of_side in ((n_train, brackets[held_out:]), (n_test, brackets[:held_out])):

        def draw(row: int, of_side: list[tuple[int, int]] = of_side) -> Example | None:
            example = _pair(_CELLS[row % len(_CELLS)], variable, of_side, rng)
            lengths = prompt_lengths(tokenizer, [example.prompt, str(example.source)])
            return example if set(lengths) == {length} else None

        sides.append(distinct(wanted, draw, rng))
    return TaskSplit(*sides)


def _pair(cell: tuple[str, str], variable: Variable, brackets: list[tuple[int, int]], rng: random.Random) -> Example:
    """A base and a source with costs where the cell says, mirrored for the upper bound."""
    base, source = cell if variable == "lower" else (_MIRROR[cell[0]], _MIRROR[cell[1]])
    missed = "below" if variable == "lower" else "above"  # where the interchanged variable is false
    answer = source != missed and base in ("within", missed)  # the other variable is the base's
    prompts = []
    for where in (base, source):
        bracket = rng.choice(brackets)
        first, last = {"below": (0, bracket[0] - 1), "within": bracket, "above": (bracket[1] + 1, _HIGHEST)}[where]
        prompts.append(_prompt(bracket, rng.randint(first, last)))
    answers = (" yes", " no") if answer else (" no", " yes")
    return Example(prompts[0], *answers, source=prompts[1])


def _prompt(bracket: tuple[int, int], cost: int) -> str:
    lower, upper, shown = (f"{cents // 100}.{cents % 100:02d}" for cents in (*bracket, cost))
    return PRICE_TEMPLATE.format(lower=lower, upper=upper, cost=shown)
