"""The two tasks of the report, each in two forms, and the wordings that nothing was learned on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import tasks
from ..tasks.examples import Example
from ..tasks.three_way import ThreeWaySplit, conflicts_three_ways, sentences_three_ways

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .size import Size

Split = Callable[..., ThreeWaySplit]
#: The names of a task's forms, by whether the tokens are aligned.
FORMS = {False: "any-length", True: "aligned"}


@dataclass(frozen=True, slots=True)
class Task:
    """A task in two forms: prompts of any length, and prompts whose tokens are aligned."""

    name: str
    title: str
    short: str
    held_out: str  # what validation and test do not share with training
    any_length: Split
    aligned: Split
    #: Wordings that occur neither in training nor in validation, by name: for what was learned on prompts of any
    #: length, and for what was learned on aligned prompts, which have held-out countries and templates of their own.
    wordings: Mapping[str, tuple[Split, Split]]
    near: str = ""  # what the report says about a wording that is near to what a form learns from

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, size: Size, seed: int, *, aligned: bool = False
    ) -> ThreeWaySplit:
        """The examples of a seed, which chooses what is held out and which prompts there are."""
        counts = (size.n_train, size.n_validation, size.n_test)
        return (self.aligned if aligned else self.any_length)(tokenizer, counts, seed)

    def reworded(
        self, tokenizer: PreTrainedTokenizerBase, size: Size, seed: int, wording: str, *, aligned: bool = False
    ) -> list[Example]:
        """Test examples of a seed in another wording, for what was learned on prompts of this form."""
        return self.wordings[wording][aligned](tokenizer, (1, 1, size.n_transferred), seed).test


def _conflicts(templates: Sequence[str], **options: Any) -> Split:
    return partial(conflicts_three_ways, templates=templates, whole_names=False, **options)


def _reworded_conflicts(templates: Sequence[str]) -> tuple[Split, Split]:
    """For each form the countries that it holds out, which its seed chooses among those that it uses."""
    others = [text for text in templates if text not in tasks.ALIGNED_CONFLICT_TEMPLATES]
    return _conflicts(templates), partial(conflicts_three_ways, templates=others)


def _sentences(templates: Sequence[str], **options: Any) -> Split:
    return partial(sentences_three_ways, templates=templates, **options)


def _new_sentences(templates: Sequence[str], **options: Any) -> Split:
    """Templates that no form learns from, so that all of them serve for testing."""
    return _sentences(templates, own_templates=False, **options)


_TWO_SENTENCES = (
    "{first} and {second} went to the {place}. At the {place}, {giver} gave a {thing} to",
    "{first} met {second} at the {place}. Before long, {giver} handed a {thing} to",
)
_THREE_SENTENCES = (
    "{first} and {second} were at the {place}. It was late. {giver} had a {thing}, and gave it to",
    "{first} and {second} came to the {place}. There was a {thing}. {giver} took it and passed it to",
)
_GIVER_FIRST = ("BABA",)
_NOT_ALIGNED = tuple(
    text for text in tasks.INDIRECT_OBJECT_TEMPLATES if text not in tasks.ALIGNED_INDIRECT_OBJECT_TEMPLATES
)
_CONFLICTS = tasks.CONFLICT_TEMPLATES
TASKS = (
    Task(
        "country-capital", "Country-capital conflicts", "capitals", "countries",
        _conflicts(_CONFLICTS[:1]),
        partial(conflicts_three_ways, templates=tasks.ALIGNED_CONFLICT_TEMPLATES, aligned=True),
        {
            "another layout": _reworded_conflicts(_CONFLICTS[1:3]),
            "another question": _reworded_conflicts(_CONFLICTS[3:5]),
            "a repetition instead of a question": _reworded_conflicts(_CONFLICTS[5:]),
        },
        "The aligned prompts, which DynScalar was learned on, are repetitions too, in other words than those below.",
    ),
    Task(
        "indirect-object", "Indirect object identification", "names", "templates",
        _sentences(tasks.INDIRECT_OBJECT_TEMPLATES),
        _sentences(tasks.ALIGNED_INDIRECT_OBJECT_TEMPLATES, aligned=True),
        {
            "two sentences": (_new_sentences(_TWO_SENTENCES),) * 2,
            "three sentences": (_new_sentences(_THREE_SENTENCES),) * 2,
            "the giver is always named first": (
                _sentences(tasks.INDIRECT_OBJECT_TEMPLATES, orders=_GIVER_FIRST),
                _new_sentences(_NOT_ALIGNED, orders=_GIVER_FIRST),
            ),
        },
    ),
)  # fmt: skip

#: Sentences to put before a prompt; they name neither a country nor a person.
_BEFORE = (
    "The rain had stopped by noon.",
    "A small boat crossed the lake while the wind turned to the west.",
    "Nobody remembered who had painted the old wooden door at the end of the lane.",
    "The bakery opened early, and the smell of fresh bread reached the next street.",
)
#: Numbers of sentences before the prompts.
N_BEFORE = (0, 2, 4)


def longer(examples: list[Example], n_sentences: int) -> list[Example]:
    """The same questions after some unrelated sentences."""
    before = " ".join(_BEFORE[:n_sentences])
    return [replace(example, prompt=f"{before} {example.prompt}") for example in examples] if before else examples
