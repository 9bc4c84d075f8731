"""Examples, each a prompt with two competing next tokens, and their JSONL files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .._files import atomic_path


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with a correct and a wrong answer.

    Args:
        prompt: the text before the answer; not empty.
        correct: the correct answer exactly as it follows the prompt, usually with a leading space (" Berlin").
        wrong: the wrong answer (" Paris"). Answers may have several tokens and be in any script; `fit` and `evaluate`
            check that neither begins with the other.
        source: for an interchange, the second prompt, from which activations are taken. `prompt` is then the base and
            `correct` the answer that the interchange should give.

    Raises:
        TypeError, ValueError: an argument that is not a string, an empty prompt, answer or source, or equal answers.
    """

    prompt: str
    correct: str
    wrong: str
    source: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "correct", "wrong", "source"):
            value = getattr(self, name)
            if name == "source" and value is None:
                continue
            if not isinstance(value, str):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a string")
            if not value.strip():
                raise ValueError(f"{name}: got {value!r}, expected text")
        if self.correct == self.wrong:
            raise ValueError(f"wrong: got {self.wrong!r}, the same as correct; the two answers must differ")


def load_examples(path: str | os.PathLike[str]) -> list[Example]:
    """Read a JSONL file with one object per line and the keys "prompt", "correct", "wrong" and optionally "source".

    Blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: text that is not UTF-8 (with or without a byte order mark), or a line that is not such an object;
            the message names the line.
    """
    path = Path(path)
    examples = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})") from None
        keys = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        if keys not in (["correct", "prompt", "wrong"], ["correct", "prompt", "source", "wrong"]):
            raise ValueError(
                f"{path}, line {number}: got {keys}, expected the keys 'prompt', 'correct', 'wrong' (and 'source')"
            )
        try:
            examples.append(Example(**fields))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not examples:
        raise ValueError(f"{path}: got no examples, expected one JSON object a line")
    return examples


def save_examples(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """Write examples to a JSONL file, atomically."""
    with atomic_path(path) as temporary:
        text = "".join(json.dumps(example_fields(example), ensure_ascii=False) + "\n" for example in examples)
        temporary.write_text(text, encoding="utf-8")


def example_fields(example: Example) -> dict[str, str]:
    """The fields of an example for JSON, without a source that is None."""
    return {name: value for name, value in asdict(example).items() if value is not None}


def check_examples(examples: Sequence[Example]) -> list[Example]:
    """The examples as a list; raises if there are none, or something else among them."""
    checked = list(examples)
    if not checked:
        raise ValueError("examples: got none, expected at least one Example")
    for row, example in enumerate(checked):
        if not isinstance(example, Example):
            raise TypeError(f"examples: row {row} is a {type(example).__name__}, expected an Example")
    return checked


def sources_of(examples: Sequence[Example]) -> list[str]:
    """The source of every example; raises a ValueError that names the first row without one."""
    for row, example in enumerate(examples):
        if example.source is None:
            raise ValueError(f"examples: row {row} has no source, which an interchange takes the activations from")
    return [example.source for example in examples if example.source is not None]
