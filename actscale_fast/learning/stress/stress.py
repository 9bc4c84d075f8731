"""`stress`: one fixed strength, on prompts that were changed and on text that it should leave as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..._checks import check_counts, check_finite, is_integer, is_real
from ..._suggestions import did_you_mean
from ...frozen.encoder import check_texts
from ...interventions import Intervention
from ...tasks.examples import Example
from ...tasks.loading import ExampleSource, examples_from
from ..evaluate import measure_all
from ..head_selection.strength import Direction
from ..prompt_statistics import Measured
from .behaviours import UNRELATED, behaviours_beside
from .figures import behaviour_row, check, control_rows, overall, text_rows, worst
from .perturbations import PERTURBATIONS, NotApplicableError, Perturbation, Rule, perturbed, tokens_of
from .plain_text import PROMPTS, TEXTS, refuse_other_sources, why_not_steered
from .result import GIVEN, Check, Gate, StressResult, StressRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_T = TypeVar("_T")
_SIGNS = {"both": (1, -1), "correct": (1,), "wrong": (-1,)}


def stress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    intervention: Intervention,
    examples: ExampleSource,
    *,
    strength: float = 1.0,
    direction: Direction = "both",
    perturbations: Iterable[str] | None = None,
    own_perturbations: Mapping[str, Callable[[Example], Example]] | None = None,
    texts: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    unrelated: Mapping[str, ExampleSource] | None = None,
    task: str | None = None,
    accuracies: Mapping[str, tuple[float, float]] | None = None,
    min_control: float = 0.8,
    min_gain: float = 0.1,
    max_perplexity_ratio: float = 1.1,
    max_kl: float = 0.1,
    max_accuracy_drop: float = 0.05,
    max_drop: float = 0.2,
    max_side_effect: float = 0.1,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> StressResult:
    """Test an intervention at one fixed strength: does it still control, what does it cost, and when does it break?

    The three gates and the one strength for all of them are those of FaithSteer-BENCH (arXiv 2603.18329). What is
    measured in each, and every threshold, is our reading:

    - **control**: the share of prompts that are flipped, in the mean over the prompts as given and every perturbation
      of them, is at least `min_control`, and exceeds that of the frozen model by at least `min_gain`;
    - **utility**: under neither strength does the perplexity of plain texts grow by more than the factor
      `max_perplexity_ratio` (a geometric mean over texts), the mean KL divergence of the next token after unrelated
      prompts exceed `max_kl`, or the accuracy of a task fall by more than `max_accuracy_drop`;
    - **robustness**: no perturbation lowers the share that is flipped by more than `max_drop`, and no unrelated
      behaviour, the share of its prompts with the correct answer above the wrong one, falls by more than
      `max_side_effect`.

    A verdict follows from the figures themselves; where a 95 % bootstrap interval over the prompts (or texts) includes
    the threshold it is marked as not decided. A largest value is within its threshold, and decided, if the intervals of
    all rows (and of both strengths) are: its own interval has the largest of their lower and of their upper ends.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer; the model is left unchanged.
        intervention: the intervention to test.
        examples: held-out prompts with their two answers, as for `evaluate`; each runs three times per perturbation.
        strength: β is this, which is above 0, and, for the flips to the wrong answer, its negative.
        direction: the flips that count: to the "correct" answer under β = +strength, to the "wrong" one under
            β = −strength, or the mean of "both".
        perturbations: names of `PERTURBATIONS` in `learning/stress/perturbations.py`; None: all that can be applied to
            these examples, change them, and can be measured with this model and intervention; the others are listed in
            `left_out`.
        own_perturbations: further ones by name, each a function from an example to the changed one.
        texts: plain texts, for the perplexity; None: eight built-in ones; []: none. They are left out, with the reason
            in `left_out`, where the intervention acts at some positions of a prompt only.
        prompts: unrelated prompts, for the divergence; None: sixteen built-in ones; []: none.
        unrelated: examples of unrelated behaviours by name; None: names and years (the built-in tasks indirect-object
            and greater-than), without the one that the examples belong to. What the model or the tokenizer does not
            allow of them is listed in `left_out`.
        task: "indirect-object" or "greater-than" where the examples are of that built-in task; None: as their prompts
            say, or the user's last messages, which is known of the task's own templates alone.
        accuracies: of further tasks by name, (frozen, under the intervention), such as
            `integrations.lm_eval.accuracies` measures with lm-evaluation-harness.
        min_control, min_gain, max_perplexity_ratio, max_kl, max_accuracy_drop, max_drop, max_side_effect: thresholds.
        seed: seed of the typos, of the sentences that come before a prompt, and of the unrelated behaviours.
        batch_size: the largest number of prompts in one pass.
        progress: show a progress bar.

    Returns:
        StressResult: `.table()`, `.gates`, `.passed`, `.save()`, `.plot()`.

    Raises:
        TypeError, ValueError: bad arguments or examples, a perturbation that was named and cannot be applied, or plain
            texts for an interchange, which takes activations from a second prompt.

    Example:
        >>> print(af.stress(model, tokenizer, scalars, test[:32]))
        >>> af.stress(model, tokenizer, vector, test, strength=0.5, direction="correct").save("stress.json")
    """
    if not isinstance(intervention, Intervention):
        raise TypeError(f"intervention: got {type(intervention).__name__}, expected an Intervention")
    check_counts(batch_size=batch_size)
    if not is_integer(seed):
        raise ValueError(f"seed: got {seed!r}, expected an integer")
    thresholds = {
        "min_control": min_control, "min_gain": min_gain, "max_perplexity_ratio": max_perplexity_ratio,
        "max_kl": max_kl, "max_accuracy_drop": max_accuracy_drop, "max_drop": max_drop,
        "max_side_effect": max_side_effect,
    }  # fmt: skip
    check_finite(strength=strength, **thresholds)
    if strength <= 0:
        raise ValueError(
            f"strength: got {strength:g}, expected more than 0; β = −strength is measured as well, or with "
            'direction="wrong" alone'
        )
    if task is not None and task not in UNRELATED:
        raise ValueError(f"task: got {task!r}, expected None or one of {', '.join(map(repr, UNRELATED))}")
    if direction not in _SIGNS:
        raise ValueError(f"direction: got {direction!r}, expected 'both', 'correct' or 'wrong'")
    checked_accuracies = _checked_accuracies(accuracies or {})
    if (texts is None or texts) or (prompts is None or prompts):
        refuse_other_sources(intervention)
    given = examples_from(examples)
    left_out: dict[str, str] = {}
    sets = _perturbed_sets(given, tokenizer, perturbations, own_perturbations or {}, seed, left_out)
    behaviours = behaviours_beside(unrelated, intervention, given, tokenizer, task, seed, left_out)
    common: dict[str, Any] = {"strength": float(strength), "batch_size": batch_size}
    signs = _SIGNS[direction]

    def measure(prefix: str, name: str, some: list[Example], named: bool) -> Measured | None:
        values = None
        with _left_out_unless(named, name, left_out, prefix):
            ((values, _),) = measure_all(model, tokenizer, some, [intervention], **common)
        return values

    measured = {}
    for name, (_, some) in _bar(sets, progress):
        prefix = "" if name == GIVEN else f"perturbation {name!r}: "
        named = name == GIVEN or perturbations is not None or name in (own_perturbations or {})
        if (values := measure(prefix, name, some, named)) is not None:
            measured[name] = values
    effects = []
    for name, some in _bar(behaviours, progress):
        if (values := measure(f"unrelated {name!r}: ", name, some, unrelated is not None)) is not None:
            effects.append(behaviour_row(name, values, signs))
    control = control_rows({name: kind for name, (kind, _) in sets.items()}, measured, signs)
    costs: list[StressRow] = []
    how: tuple[Any, ...] = (float(strength), signs, batch_size)
    with _left_out_unless(texts is not None, "plain texts", left_out):
        costs += _on_texts(model, tokenizer, intervention, TEXTS if texts is None else texts, how, left_out)
    with _left_out_unless(prompts is not None, "unrelated prompts", left_out):
        some_prompts = PROMPTS if prompts is None else prompts
        costs += text_rows(model, tokenizer, intervention, (), some_prompts, *how)
    costs += [
        StressRow("utility", name, "accuracy", None, {"frozen": before, "change": before - after})
        for name, (before, after) in checked_accuracies.items()
    ]
    found = overall(measured, signs)
    allowed = {"perplexity": max_perplexity_ratio, "KL": max_kl, "accuracy": max_accuracy_drop}
    gates = [
        Gate(
            "control",
            [
                Check("flipped", *found["flipped"], min_control, True),
                Check("gain over the frozen model", *found["gain"], min_gain, True),
            ],
        ),
        Gate("utility", [check(row, allowed[row.kind]) for row in costs]),
        Gate(
            "robustness",
            worst("largest drop", control[1:], "drop", max_drop)
            + worst("largest side effect", effects, "change", max_side_effect),
        ),
    ]
    return StressResult(control + costs + effects, gates, float(strength), direction, len(given), left_out)


@contextlib.contextmanager
def _left_out_unless(named: bool, name: str, left_out: dict[str, str], prefix: str = "") -> Iterator[None]:
    """A ValueError of what the caller named is raised, after the prefix; of anything else it is why it is left out."""
    try:
        yield
    except ValueError as error:
        if not named:
            left_out[name] = str(error)
        elif prefix:
            raise ValueError(f"{prefix}{error}") from error
        else:
            raise


def _on_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, intervention: Intervention, texts: Sequence[str],
    how: tuple[Any, ...], left_out: dict[str, str],
) -> list[StressRow]:  # fmt: skip
    """The row of the perplexity, if the intervention acts on every token of the texts."""
    if not texts:
        return []
    check_texts(texts, "texts", plain=True)
    reason = why_not_steered(model, tokenizer, intervention, texts)
    if reason is not None:
        left_out["plain texts"] = reason
        return []
    return text_rows(model, tokenizer, intervention, texts, (), *how)


def _perturbed_sets(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, names: Iterable[str] | None,
    own: Mapping[str, Callable[[Example], Example]], seed: int, left_out: dict[str, str],
) -> dict[str, tuple[str, list[Example]]]:  # fmt: skip
    """(kind, examples) by name, those given first."""
    if isinstance(names, str):
        raise TypeError("perturbations: got a string, expected a list of names")
    chosen = list(PERTURBATIONS if names is None else names)
    for name in chosen:
        if name not in PERTURBATIONS:
            raise ValueError(
                f"perturbations: got {name!r}, expected some of {', '.join(PERTURBATIONS)}"
                + did_you_mean(str(name), PERTURBATIONS)
            )
    for name in own:
        if name in PERTURBATIONS or name == GIVEN:
            raise ValueError(f"own_perturbations: the name {name!r} is taken")
    rules = {name: PERTURBATIONS[name] for name in chosen}
    rules |= {name: Perturbation("own", _as_rule(change)) for name, change in own.items()}
    sets, before = {GIVEN: ("", examples)}, tokens_of(examples, tokenizer)
    for name, (kind, rule) in rules.items():
        try:
            made = perturbed(name, rule, examples, tokenizer, seed)
            if tokens_of(made, tokenizer) == before:
                raise NotApplicableError(f"perturbation {name!r}: changes no token of the prompts")
        except ValueError as error:
            if names is not None or name in own:
                raise
            left_out[name] = str(error).removeprefix(f"perturbation {name!r}: ")
            continue
        sets[name] = (kind, made)
    return sets


def _as_rule(change: Callable[[Example], Example]) -> Rule:
    return lambda example, _: change(example)


def _checked_accuracies(given: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    found = {}
    for name, both in given.items():
        values = tuple(both) if isinstance(both, Sequence) and not isinstance(both, str) else ()
        if len(values) != 2 or not all(is_real(value) and 0 <= value <= 1 for value in values):
            raise ValueError(
                f"accuracies: got {both!r} for {name!r}, expected two numbers from 0 to 1: frozen, and under the "
                "intervention"
            )
        found[name] = (float(values[0]), float(values[1]))
    return found


def _bar(sets: Mapping[str, _T], progress: bool) -> Iterable[tuple[str, _T]]:
    from tqdm.auto import tqdm

    return tqdm(sets.items(), desc="stress", disable=not progress, leave=False)
