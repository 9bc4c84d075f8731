"""Named perturbations of examples: rules that change a prompt and keep the words of its two answers.

FaithSteer-BENCH (arXiv 2603.18329) names the kinds: mild instructions, role prompts, and encoding transformations. The
rules and wordings here are ours, as are paraphrases and other lengths; its "data scarcity" concerns how an intervention
is learned and has no rule.

All rules keep the words of both answers, and with them what the model may copy. The two that make a chat also strip the
space before an answer where the chat template ends with a line break or space, after which models begin without one: an
answer of one token may then have several, which is measured by the log-probability of them all, so that a part of what
changes may be due to the measure. In a chat the other rules change the user's last message. A source (of an
interchange) is changed like the prompt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ...frozen.chat import Messages, chat_text, has_chat_template, user_message
from ...tasks.examples import Example, prompt_of
from ...tasks.known_prompts import paraphrased
from ..prompt_spaces import without_needless_space

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NotApplicableError(ValueError):
    """A perturbation that an example, or the tokenizer, does not allow; the message says why."""


class Surroundings(NamedTuple):
    """What a rule gets besides the example."""

    tokenizer: PreTrainedTokenizerBase
    row: int  # the example's number, from 0
    seed: int


Rule = Callable[[Example, Surroundings], Example]


class Perturbation(NamedTuple):
    """A rule, and the kind that it belongs to."""

    kind: str
    rule: Rule


#: Sentences that may precede a prompt: ours, about none of the built-in tasks.
ASIDES = (
    "The kettle in the kitchen takes four minutes to boil.",
    "Most bicycles need a little oil on the chain in spring.",
    "A loaf of rye bread keeps fresh for about a week.",
    "The lighthouse keeper painted the stairs green last summer.",
    "Bees find their way back to the hive by the position of the sun.",
    "The library lends out more cookery books than novels.",
    "A violin has four strings, and its bow is made of horsehair.",
    "Snow melts first on the side of the roof that faces south.",
)
_INSTRUCTIONS = {
    "instruction-continue": "Continue the following text.",
    "instruction-brief": "Be brief, and reply with the answer only.",
}
_ROLES = {
    "role-expert": "You are an experienced expert, and people rely on what you say.",
    "role-child": "You are a ten-year-old child who likes to chat.",
}
_SYSTEM = "You are a helpful assistant who completes what the user begins."
#: The share of the words that can have a typo which get one; at least one does.
_TYPOS = 1 / 3
_SHORTEST_TYPO = 5


def perturbed(
    name: str, rule: Rule, examples: list[Example], tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[Example]:
    """The examples under one rule, in their order.

    Raises:
        NotApplicableError: the rule does not apply to one of them; the message names the perturbation.
    """
    made = []
    for row, example in enumerate(examples):
        try:
            found = rule(example, Surroundings(tokenizer, row, seed))
        except NotApplicableError as error:
            raise NotApplicableError(
                f"perturbation {name!r}: {example.where or f'row {row + 1} of examples'} {error}"
            ) from None
        if not isinstance(found, Example):
            raise TypeError(f"perturbation {name!r}: got {type(found).__name__} from its function, expected an Example")
        made.append(found)
    return made


def tokens_of(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each prompt, by which changed prompts are told from those given."""
    made = []
    for row, example in enumerate(examples):
        prompt = prompt_of(example)
        plain = isinstance(prompt, str)
        text = (
            prompt if isinstance(prompt, str) else chat_text(tokenizer, prompt, str(example.where or f"row {row + 1}"))
        )
        made.append(list(tokenizer(text, add_special_tokens=plain)["input_ids"]))
    return made


def _of_text(change: Callable[[str, Example, Surroundings], str]) -> Rule:
    """A rule that changes the text of the prompt (of a chat the user's last message), and that of the source."""

    def rule(example: Example, around: Surroundings) -> Example:
        def changed(prompt: str | Messages) -> str | Messages:
            if isinstance(prompt, str):
                return change(prompt, example, around)
            rows = [dict(message) for message in prompt]
            last = max((i for i, message in enumerate(rows) if message["role"] == "user"), default=None)
            if last is None:
                raise NotApplicableError("has no message of a user")
            rows[last]["content"] = change(rows[last]["content"], example, around)
            return rows

        source = None if example.source is None else changed(example.source)
        return _with_prompt(example, changed(prompt_of(example)), source)

    return rule


def _with_prompt(example: Example, prompt: str | Messages, source: str | Messages | None) -> Example:
    if isinstance(prompt, str):
        return replace(example, prompt=prompt, messages=None, source=source)
    return replace(example, prompt="", messages=prompt, source=source)


def _before(text: str) -> Rule:
    return _of_text(lambda prompt, example, around: f"{text}\n\n{prompt}")


def _after_asides(number: int) -> Rule:
    """Sentences of another subject come first; which ones depends on the seed and the row."""

    def change(prompt: str, example: Example, around: Surroundings) -> str:
        order = random.Random(f"{around.seed} {around.row}").sample(ASIDES, number)
        return f"{' '.join(order)} {prompt}"

    return _of_text(change)


def _in_other_words(prompt: str, example: Example, around: Surroundings) -> str:
    found = paraphrased(prompt, around.row)
    if found is None:
        raise NotApplicableError("is not in a template of a built-in task, so that no other wording is known")
    return found


def _chat(system: str | None) -> Rule:
    """The prompt as a user's message in the tokenizer's chat template, after one of the system if there is one."""

    def in_chat(prompt: str | Messages) -> Messages:
        if not isinstance(prompt, str):
            raise NotApplicableError("is a chat already")
        first = () if system is None else ({"role": "system", "content": system},)
        return (*first, *user_message(prompt))

    def rule(example: Example, around: Surroundings) -> Example:
        if not has_chat_template(around.tokenizer):
            raise NotApplicableError("cannot be written as a chat: the tokenizer has no chat template")
        source = None if example.source is None else in_chat(example.source)
        made = _with_prompt(example, in_chat(prompt_of(example)), source)
        try:
            chat_text(around.tokenizer, made.messages or (), "the example")
        except ValueError as error:
            raise NotApplicableError(f"cannot be written as a chat: {error}") from None
        return without_needless_space(made, around.tokenizer)

    return rule


def _outside_answers(text: str, example: Example, change: Callable[[str], str]) -> str:
    """The text with everything changed but the words that are an answer, or that an answer is the beginning of.

    An answer that stands in the text as a word of its own, or has one letter, is no beginning of other words.
    """
    answers = sorted({answer.strip() for answer in (example.correct, example.wrong)}, key=len, reverse=True)
    patterns = []
    for answer in answers:
        after = r"(?!\w)" if re.match(r"\w", answer[-1:]) else ""
        word = rf"(?<!\w){re.escape(answer)}{after}"
        begins = len(answer) > 1 and re.search(word, text) is None
        patterns.append(rf"(?<!\w){re.escape(answer)}\w*" if begins else word)
    kept = re.compile("|".join(patterns))
    parts, end = [], 0
    for match in kept.finditer(text):
        parts += [change(text[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, change(text[end:])])


def _cased(change: Callable[[str], str]) -> Rule:
    return _of_text(lambda prompt, example, around: _outside_answers(prompt, example, change))


def _spaced(prompt: str, example: Example, around: Surroundings) -> str:
    return re.sub(r"(?<=\S) (?=\S)", "  ", prompt)


def _mistyped(prompt: str, example: Example, around: Surroundings) -> str:
    """Two neighbouring letters inside some lower-case words are swapped; names, numbers and the last word stay."""
    answers = {word for answer in (example.correct, example.wrong) for word in answer.lower().split()}
    places = [
        match.span()
        for match in re.finditer(rf"(?<!\w)[a-z]{{{_SHORTEST_TYPO},}}(?!\w)", prompt)
        if match[0] not in answers and match.end() < len(prompt) and _swaps(match[0])
    ]
    if not places:
        raise NotApplicableError("has no word that can have a typo")
    draw = random.Random(f"{around.seed} {around.row}")
    letters = list(prompt)
    for start, end in draw.sample(places, max(round(_TYPOS * len(places)), 1)):
        at = start + draw.choice(_swaps(prompt[start:end]))
        letters[at], letters[at + 1] = letters[at + 1], letters[at]
    return "".join(letters)


def _swaps(word: str) -> list[int]:
    """The places inside a word where two different letters can be swapped; the first and last letter stay."""
    return [at for at in range(1, len(word) - 2) if word[at] != word[at + 1]]


PERTURBATIONS: Mapping[str, Perturbation] = {
    "paraphrase": Perturbation("paraphrase", _of_text(_in_other_words)),
    **{name: Perturbation("instruction", _before(text)) for name, text in _INSTRUCTIONS.items()},
    **{name: Perturbation("role", _before(text)) for name, text in _ROLES.items()},
    "role-chat": Perturbation("role", _chat(None)),
    "role-system": Perturbation("role", _chat(_SYSTEM)),
    "length-1": Perturbation("length", _after_asides(1)),
    "length-4": Perturbation("length", _after_asides(4)),
    "lower-case": Perturbation("encoding", _cased(str.lower)),
    "upper-case": Perturbation("encoding", _cased(str.upper)),
    "spaces": Perturbation("encoding", _of_text(_spaced)),
    "typos": Perturbation("encoding", _of_text(_mistyped)),
}
"""All perturbations, by name.

| name | what it does to the prompt |
|---|---|
| `paraphrase` | another template of the built-in task that the prompt belongs to; which one depends on the row |
| `instruction-continue`, `instruction-brief` | an instruction above it |
| `role-expert`, `role-child` | a role above it, as plain text |
| `role-chat` | it becomes the user's message in the chat template, and the answer begins the reply |
| `role-system` | the same after a message of the system |
| `length-1`, `length-4` | one or four sentences of another subject before it |
| `lower-case`, `upper-case` | all words but those of the answers in one case |
| `spaces` | two spaces between words |
| `typos` | two letters swapped in a third of the longer lower-case words |
"""
