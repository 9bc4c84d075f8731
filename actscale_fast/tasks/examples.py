"""Examples, each a prompt with two competing next tokens, and how they are saved."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._files import atomic_path
from ..frozen.chat import Messages, checked_messages

#: The fields that make an example, in the order in which a tuple has them; messages replace the prompt.
FIELDS = ("prompt", "correct", "wrong", "source", "messages")


@dataclass(frozen=True, slots=True, repr=False)
class Example:
    """A prompt, as text or as chat messages, with a correct and a wrong answer.

    Args:
        prompt: the text before the answer; empty exactly if there are messages.
        correct: the correct answer exactly as it follows the prompt, usually with a leading space (" Berlin").
        wrong: the wrong answer (" Paris"). Answers may have several tokens and be in any script; `fit` and `evaluate`
            check that neither begins with the other.
        source: for an interchange, the second prompt (a text or messages), from which activations are taken. The prompt
            is then the base and `correct` the answer that the interchange should give.
        messages: a chat instead of a prompt, as a list of dicts with the keys "role" and "content". The tokenizer's
            chat template writes it as text, up to where the assistant's answer begins; a last message of the assistant
            is continued by the answer. After most templates an answer has no leading space ("Berlin").
        where: what messages call the example, such as "row 3 of data.csv", which `load_examples` fills in. It is not
            part of the example: it is neither compared nor saved.

    Raises:
        TypeError, ValueError: an argument that is not a string, an empty prompt, answer or source, both a prompt and
            messages, messages without a role or content, or equal answers.

    Example:
        >>> af.Example("The capital of Germany is", " Berlin", " Paris")
        >>> af.Example(messages=[{"role": "user", "content": "Capital of Germany?"}], correct="Berlin", wrong="Paris")
    """

    prompt: str = ""
    correct: str = ""
    wrong: str = ""
    source: str | Messages | None = field(default=None, hash=False)
    messages: Messages | None = field(default=None, hash=False)
    where: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.messages is not None:
            object.__setattr__(self, "messages", checked_messages(self.messages))
        if isinstance(self.source, list | tuple):
            object.__setattr__(self, "source", checked_messages(self.source, "source"))
        texts = ["correct", "wrong"]
        if self.messages is None:
            texts.insert(0, "prompt")
        elif self.prompt:
            raise ValueError("messages: got a prompt as well, expected only one of them")
        if self.source is not None and not isinstance(self.source, tuple):
            texts.append("source")
        for name in texts:
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a string")
            if not value.strip():
                raise ValueError(f"{name}: got {value!r}, expected text")
        if self.correct == self.wrong:
            raise ValueError(f"wrong: got {self.wrong!r}, the same as correct; the two answers must differ")

    def __repr__(self) -> str:
        return f"Example({', '.join(f'{name}={value!r}' for name, value in example_fields(self).items())})"


def prompt_of(example: Example) -> str | Messages:
    """What is before the answer: the messages if there are any, otherwise the text."""
    return example.prompt if example.messages is None else example.messages


def save_examples(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """Write examples to a JSONL file, atomically."""
    with atomic_path(path) as temporary:
        text = "".join(json.dumps(example_fields(example), ensure_ascii=False) + "\n" for example in examples)
        temporary.write_text(text, encoding="utf-8")


def example_fields(example: Example) -> dict[str, Any]:
    """The fields of an example for JSON, without those that it does not have."""
    found = {name: getattr(example, name) for name in FIELDS}
    return {name: value for name, value in found.items() if value is not None and value != ""}


def sources_of(examples: Sequence[Example]) -> list[str | Messages]:
    """The source of every example; raises a ValueError that names the first one without."""
    for row, example in enumerate(examples, 1):
        if example.source is None:
            where = example.where or f"row {row} of examples"
            raise ValueError(f"{where} has no source, which an interchange takes the activations from")
    return [example.source for example in examples if example.source is not None]
