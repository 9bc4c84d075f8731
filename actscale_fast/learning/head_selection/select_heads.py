"""`select_heads`: score all heads by one method, keep the best, and choose their strength on examples held back."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..._checks import check_counts, check_finite, is_integer, is_real
from ...architectures.layout import layout
from ...architectures.location import Location
from ...tasks.examples import Example
from ...tasks.loading import ExampleSource, examples_from
from ..arguments import refuse_inference_mode
from .fitting import refitted
from .methods import SHARES, Method, checked_method
from .selection import HeadSelection, top, warn_of_fewer
from .strength import Direction, check_choice
from .subject import Scored, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Tokens of a prompt that a RunTwice has positions for, at least.
_LONGEST = 64


def select_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSource,
    method: str = "attribution",
    k: int = 10,
    *,
    layers: Iterable[int] | None = None,
    strength: float | None = None,
    strengths: Sequence[float] | None = None,
    validation: float | ExampleSource = 0.25,
    max_kl: float | None = None,
    direction: Direction = "both",
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
    **options: Any,
) -> HeadSelection:
    """Choose k attention heads to scale, by any published method or by this package's own.

    =================== ============================================================ ==========================
    method              a head's score                                               source
    =================== ============================================================ ==========================
    "attribution"       the gradient of the logit difference by its scalar           attribution patching
    "knock-out"         the change of the logit difference when it is removed        ablation
    "juice"             the gain of p(correct) when it is scaled; run twice          arXiv 2503.10996
    "juice-once"        the same; run once                                           arXiv 2503.10996
    "sami"              the cosine of what it adds with a concept                    arXiv 2506.17052
    "sadi"              the difference of its activations on contrastive texts       arXiv 2410.12299
    "head-pursuit"      the share of what it adds that a concept's tokens explain    arXiv 2510.21518
    "gates"             a gate between 0 and 1, learned under opposite pressures     arXiv 2505.13737
    "gates-contrastive" the same, while the wrong answers are forgotten              arXiv 2505.13737
    "interchange"       a sparse gate that takes its activation from the source      arXiv 2407.03779
    "activ-scalar"      \\|α\\| of a sparse fit with k active scalars                  arXiv 2410.04962
    "…-refit"           after "attribution", "knock-out" or "random": α is fitted    this package
    "random"            random                                                       control
    =================== ============================================================ ==========================

    The methods without a fit give each head a sign (+1 amplifies, −1 suppresses, under β = +1) and share one strength,
    which is chosen on validation examples. The page "Systems and their papers" says what each computes, and where the
    definition is our reading of the paper.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer. The model is left unchanged.
        examples: prompts with their two answers, as for `fit`; for "interchange" also with their source.
        method: see above.
        k: the number of heads. Fewer are chosen, with a warning, where the method gives fewer a value that is not 0.
        layers: the layers whose heads are scored; None: all.
        strength: a given strength; no validation examples are then held back.
        strengths: strengths to try; None: those of the method (0.25 to 8; with a fit 1, or with `max_kl` 0.25 to 1).
        validation: the share of the examples to hold back for the choice of the strength, or other examples for it.
        max_kl: the largest mean KL divergence of the other tokens, in nats, on the validation examples; None: any.
        direction: which flips the strength is chosen by, "both" directions, to the "correct" answer under β = +1, or to
            the "wrong" one under β = −1.
        seed: seed of the split and of whatever the method draws.
        batch_size: the largest number of prompts in one pass.
        progress: show progress bars.
        options: options of the method: see its file in `learning/head_selection`.

    Returns:
        HeadSelection, with the scores of all heads and `.intervention()`.

    Raises:
        TypeError, ValueError: an unknown method or option, bad examples, too few of them to hold some back, more heads
            than the model has, or no strength within `max_kl`.
        RuntimeError: under torch.inference_mode(), where gradients cannot be enabled.

    Example:
        >>> selection = af.select_heads(model, tokenizer, train, method="juice-once", k=10, max_kl=0.5)
        >>> print(selection)
        >>> print(af.evaluate(model, tokenizer, test, selection.intervention()))
        >>> selection.save("heads.json")
    """
    found = checked_method(method, options)
    check_counts(k=k, batch_size=batch_size)
    refuse_inference_mode("select_heads")
    if strength is not None:
        check_finite(strength=strength)
        if strengths is not None or max_kl is not None:
            raise ValueError("strength: given together with strengths or max_kl, expected one or the other")
    scored_on, held_back = split_examples(examples, validation if strength is None else 0.0, seed)
    tried = strengths
    if tried is None:
        tried = SHARES if found.is_fitted and max_kl is not None else found.strengths
    check_choice(tried, max_kl, direction)
    if strength is None and not held_back and (len(tried) > 1 or max_kl is not None):
        raise ValueError("validation: got 0, but several strengths are to be compared; give a share, or one strength")
    begun = time.perf_counter()
    subject = Subject(
        model, tokenizer, scored_on, None if layers is None else tuple(layers), batch_size, seed, progress,
        later=held_back,
    )  # fmt: skip
    check_k(subject, k)
    scored = score(subject, found, k, options)
    made = selected(subject, method, found, scored, k, options)
    made = replace(made, seconds=round(time.perf_counter() - begun, 3))
    if strength is not None:
        return replace(made, strength=float(strength))
    if not held_back:
        return replace(made, strength=float(tried[0]))
    return made.choose_strength(
        model, tokenizer, held_back, strengths=tried, max_kl=max_kl, direction=direction, batch_size=batch_size
    )


def check_k(subject: Subject, k: int) -> None:
    """Raise a ValueError if there are fewer than k heads."""
    n_heads = int(subject.exists.sum())
    if k > n_heads:
        raise ValueError(f"k: got {k}, expected at most {n_heads}, the number of heads")


def score(subject: Subject, method: Method, k: int, options: dict[str, Any]) -> Scored:
    """The scores of all heads; heads that do not exist have the score 0 and no value."""
    if method.kind == "run-twice":
        subject.require_equal_heads("juice")
    own = {name: value for name, value in options.items() if name in method.score_options} | dict(method.fixed)
    found = method.score(subject, k, **own) if method.by_number else method.score(subject, **own)
    if not bool(found.scores.isfinite().all()):
        raise ValueError(
            f"scores: {int((~found.scores.isfinite()).sum())} of the model's heads have none that is finite"
        )
    exists = subject.exists
    return found._replace(scores=found.scores * exists, directions=found.directions * exists)


def selected(
    subject: Subject, name: str, method: Method, scored: Scored, k: int, options: dict[str, Any]
) -> HeadSelection:
    """The k best heads, with their values fitted where the method does so."""
    chosen, values = top(scored.scores, scored.directions, k), scored.directions
    warn_of_fewer(name, chosen, k)
    if not bool(chosen.any()):
        raise ValueError(f"method: {name!r} gives no head a value that is not 0")
    if method.refits:
        own = {option: value for option, value in options.items() if option in method.refit_options}
        values = refitted(subject, chosen, **own)
    return HeadSelection(
        name, scored.scores, values, chosen, _location(subject, method, scored), n_examples=len(subject.data),
        details=dict(scored.details),
    )  # fmt: skip


def _location(subject: Subject, method: Method, scored: Scored) -> Location:
    """Where the intervention of a method acts."""
    found = layout(subject.model, subject.scalars.paths)
    positions: tuple[int, ...] | None = method.positions
    if method.kind == "run-twice":
        longest = max(_LONGEST, subject.longest_prompt())
        positions = tuple(range(-longest, 0))
    if "positions" in scored.details:
        positions = tuple(scored.details["positions"])
    return found.location("head", subject.scalars.location.layers, positions, paths=subject.scalars.paths)


def split_examples(examples: ExampleSource, validation: Any, seed: int) -> tuple[list[Example], list[Example]]:
    """The examples that heads are scored on, and those that the strength is chosen on."""
    given = examples_from(examples)
    if not is_real(validation):
        return given, examples_from(validation)
    if not 0 <= validation < 1:
        raise ValueError(f"validation: got {validation!r}, expected a share from 0 to below 1, or examples")
    if not is_integer(seed):
        raise ValueError(f"seed: got {seed!r}, expected an integer")
    if validation == 0:
        return given, []
    if len(given) < 2:
        raise ValueError(
            "examples: got 1, expected at least 2, because some are held back to choose the strength; give a strength, "
            "or validation examples"
        )
    order = random.Random(seed).sample(range(len(given)), len(given))
    n = min(max(round(validation * len(given)), 1), len(given) - 1)
    held = set(order[:n])
    return [one for row, one in enumerate(given) if row not in held], [given[row] for row in sorted(held)]
