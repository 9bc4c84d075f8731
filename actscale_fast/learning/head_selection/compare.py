"""Several methods at several numbers of heads, each with a strength of its own, on the same held-out examples."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..._checks import check_counts
from ..._json import write_json
from ..._tables import Readable
from ...tasks.examples import Example
from ...tasks.loading import ExampleSource, examples_from
from ..arguments import refuse_inference_mode
from ..evaluate import Evaluation, evaluate, evaluate_all
from .methods import METHODS, SHARES, checked_method
from .select_heads import check_k, score, selected, split_examples
from .selection import HeadSelection
from .strength import Direction, NoStrengthAllowedError, check_choice
from .subject import Scored, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class HeadResult:
    """One method at one number of heads."""

    selection: HeadSelection
    evaluation: Evaluation

    @property
    def seconds(self) -> float:
        """Duration of scoring, of the fit if there is one, and of the choice of the strength.

        Scores that several rows share were computed once and count in each.
        """
        return self.selection.seconds


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class HeadComparison(Readable):
    """The result of `compare_heads`."""

    results: list[HeadResult] = field(repr=False)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text; the brackets are 95 % intervals over the held-out prompts."""
        rows = []
        for one in self.results:
            found, chosen = one.evaluation, one.selection
            cells = [chosen.method, str(chosen.k), f"{chosen.strength:g}"]
            for name in ("flip_to_correct", "flip_to_wrong"):
                low, high = found.intervals.get(name, (float("nan"), float("nan")))
                cells.append(f"{getattr(found, name):.2f} [{low:.2f}, {high:.2f}]")
            top = "" if found.top_correct is None else f"{found.top_correct:.2f}"
            rows.append([*cells, top, f"{found.kl:.3f}", f"{one.seconds:.1f}"])
        columns = ["method", "heads", "strength", "correct above wrong, β = +1", "wrong above correct, β = −1"]
        return [*columns, "correct is top, β = +1", "KL", "s"], rows

    def _heading(self) -> str:
        n = self.results[0].evaluation.n_examples if self.results else 0
        return f"Heads by several methods, on {n} held-out prompts"

    def _notes(self) -> list[str]:
        frozen = self.results[0].evaluation.baseline if self.results else None
        if frozen is None:
            return []
        return [f"frozen model: {frozen.flip_to_correct:.2f} and {frozen.flip_to_wrong:.2f}"]

    def to_dict(self) -> dict[str, Any]:
        """All figures and the chosen heads, for JSON; without the scores of all heads."""
        rows = []
        for one in self.results:
            heads = [[head.layer, head.head, head.score, head.alpha] for head in one.selection.heads]
            row = {"method": one.selection.method, "k": one.selection.k, "strength": one.selection.strength}
            row |= {"seconds": one.seconds, "heads": heads, "validation": one.selection.validation}
            rows.append(row | {"evaluation": one.evaluation.to_dict()})
        return {"results": rows}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a JSON file, atomically."""
        write_json(path, self.to_dict())


def compare_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSource,
    test: ExampleSource,
    methods: Iterable[str] | None = None,
    k: Sequence[int] = (5, 10, 20, 40),
    *,
    layers: Iterable[int] | None = None,
    strengths: Sequence[float] | None = None,
    validation: float | ExampleSource = 0.25,
    max_kl: float | None = None,
    direction: Direction = "both",
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> HeadComparison:
    """Choose heads by several methods, at several numbers of heads, and measure all of them on held-out examples.

    Heads are scored on one part of `examples`, each strength is chosen on the other part, and `test` only judges.
    Methods that share their scores compute them once.

    Args:
        model, tokenizer, layers, strengths, validation, max_kl, direction, seed, batch_size, progress: as in
            `select_heads`.
        examples: examples to choose heads and strengths on.
        test: held-out examples.
        methods: names of methods; None: all that need no source, and "interchange" where all examples have one.
        k: numbers of heads.
        options: options by method.

    Returns:
        HeadComparison, one row per method and number of heads. Where no strength stays within `max_kl`, the row is left
        out with a warning.

    Raises:
        TypeError, ValueError: as `select_heads`.

    Example:
        >>> train, test = af.tasks.country_capital_conflicts(tokenizer)
        >>> print(af.compare_heads(model, tokenizer, train, test, ["random", "juice-once", "attribution-refit"]))
    """
    refuse_inference_mode("compare_heads")
    scored_on, held_back = split_examples(examples, validation, seed)
    tested = examples_from(test, "test")
    have_sources = all(one.source is not None for one in [*scored_on, *held_back, *tested])
    names = [name for name in METHODS if name != "interchange" or have_sources] if methods is None else list(methods)
    given = {name: dict((options or {}).get(name, {})) for name in names}
    unused = set(options or {}) - set(names)
    if unused:
        raise ValueError(f"options: got some for {', '.join(sorted(unused))}, which are not compared")
    found = {name: checked_method(name, given[name]) for name in names}
    counts = list(k)
    for count in counts:
        check_counts(k=count)
    if not counts or not names:
        raise ValueError(f"{'k' if names else 'methods'}: got none, expected at least one")
    check_choice((1.0,) if strengths is None else strengths, max_kl, direction)
    if not held_back:
        raise ValueError("validation: got 0, expected a share of the examples, or examples, to choose strengths on")
    subject = Subject(
        model, tokenizer, scored_on, None if layers is None else tuple(layers), batch_size, seed, progress,
        later=[*held_back, *tested],
    )  # fmt: skip
    check_k(subject, max(counts))
    known: dict[Any, tuple[Scored, float]] = {}
    chosen: list[HeadSelection] = []
    for name, method in found.items():
        own = given[name]
        for count in counts:
            of_scores = {key: repr(value) for key, value in own.items() if key in method.score_options}
            key = (method.score, tuple(sorted((of_scores | dict(method.fixed)).items())), count * method.by_number)
            if key not in known:
                begun = time.perf_counter()
                known[key] = score(subject, method, count, own), time.perf_counter() - begun
            scored, spent = known[key]
            begun = time.perf_counter()
            made = selected(subject, name, method, scored, count, own)
            tried = strengths
            if tried is None:
                tried = SHARES if method.is_fitted and max_kl is not None else method.strengths
            try:
                made = made.choose_strength(
                    model, tokenizer, held_back, strengths=tried, max_kl=max_kl, direction=direction,
                    batch_size=batch_size,
                )  # fmt: skip
            except NoStrengthAllowedError as error:
                warnings.warn(f"{name} with {count} heads is left out: {error}", stacklevel=2)
                continue
            chosen.append(replace(made, seconds=round(spent + time.perf_counter() - begun, 3)))
    evaluations = _evaluated(model, tokenizer, tested, chosen, batch_size)
    return HeadComparison([HeadResult(one, evaluation) for one, evaluation in zip(chosen, evaluations, strict=True)])


def _evaluated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tested: list[Example], chosen: Sequence[HeadSelection],
    batch_size: int,
) -> list[Evaluation]:  # fmt: skip
    """The evaluations of all selections; those without stored activations share the passes of the frozen model."""
    made = [one.intervention() for one in chosen]
    alone = [any(part.needs_source for part in one.singles) for one in made]
    together = [one for one, is_alone in zip(made, alone, strict=True) if not is_alone]
    shared = iter(evaluate_all(model, tokenizer, tested, together, batch_size=batch_size) if together else [])
    return [
        evaluate(model, tokenizer, tested, one, batch_size=batch_size) if is_alone else next(shared)
        for one, is_alone in zip(made, alone, strict=True)
    ]
