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
    #: Wordings that occur neither in training nor in validation, by name.
    wordings: Mapping[str, Split]

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, size: Size, seed: int, *, aligned: bool = False
    ) -> ThreeWaySplit:
        """The examples of a seed, which chooses what is held out and which prompts there are."""
        counts = (size.n_train, size.n_validation, size.n_test)
        return (self.aligned if aligned else self.any_length)(tokenizer, counts, seed)

    def reworded(self, tokenizer: PreTrainedTokenizerBase, size: Size, seed: int, wording: str) -> list[Example]:
        """Test examples of a seed in another wording."""
        return self.wordings[wording](tokenizer, (1, 1, size.n_transferred), seed).test


def _conflicts(templates: Sequence[str], **options: Any) -> Split:
    return partial(conflicts_three_ways, templates=templates, whole_names=False, **options)


def _sentences(templates: Sequence[str], **options: Any) -> Split:
    return partial(sentences_three_ways, templates=templates, **options)


_TWO_SENTENCES = (
    "{first} and {second} went to the {place}. At the {place}, {giver} gave a {thing} to",
    "{first} met {second} at the {place}. Before long, {giver} handed a {thing} to",
)
_THREE_SENTENCES = (
    "{first} and {second} were at the {place}. It was late. {giver} had a {thing}, and gave it to",
    "{first} and {second} came to the {place}. There was a {thing}. {giver} took it and passed it to",
)
_CONFLICTS = tasks.CONFLICT_TEMPLATES
TASKS = (
    Task(
        "country-capital", "Country-capital conflicts", "capitals", "countries",
        _conflicts(_CONFLICTS[:1]),
        partial(conflicts_three_ways, templates=tasks.ALIGNED_CONFLICT_TEMPLATES, aligned=True),
        {
            "another layout": _conflicts(_CONFLICTS[1:3]),
            "another question": _conflicts(_CONFLICTS[3:5]),
            "a repetition instead of a question": _conflicts(_CONFLICTS[5:]),
        },
    ),
    Task(
        "indirect-object", "Indirect object identification", "names", "templates",
        _sentences(tasks.INDIRECT_OBJECT_TEMPLATES),
        _sentences(tasks.ALIGNED_INDIRECT_OBJECT_TEMPLATES, aligned=True),
        {
            "two sentences": _sentences(_TWO_SENTENCES, own_templates=False),
            "three sentences": _sentences(_THREE_SENTENCES, own_templates=False),
            "the giver is always named first": _sentences(tasks.INDIRECT_OBJECT_TEMPLATES, orders=("BABA",)),
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
