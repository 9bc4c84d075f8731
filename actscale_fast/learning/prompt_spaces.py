"""A warning about spaces at the border of prompt and answer, where they change the tokens that a model sees."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..frozen.chat import chat_text
from ..tasks.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def warn_of_spaces(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn, once for all examples, of prompts that end with a space, and of answers that begin with one in a chat."""
    ending = [example for example in examples if _written_end(example).endswith(" ")]
    if ending:
        ends = "end" if len(ending) > 1 else "ends"
        warnings.warn(
            f"{_counted(ending)} {ends} with a space. Tokenizers join a space to the word after it, so models rarely "
            "see a text that stops there: remove the space from the prompt and begin the answers with it (' Berlin')",
            stacklevel=4,
        )
    beginning = [example for example in examples if _opens_turn(example) and example.correct[0] == " "]
    if beginning and _begins_without_space(beginning[0], tokenizer):
        have = "have answers that begin" if len(beginning) > 1 else "has answers that begin"
        warnings.warn(
            f"{_counted(beginning)} {have} with a space, but the chat template ends with a line break or space, after "
            "which models begin without one: write the answers without it ('Berlin')",
            stacklevel=4,
        )


def without_needless_space(example: Example, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The example with answers as a model begins them: after a line break of the chat template, without a space."""
    if not _opens_turn(example) or not _begins_without_space(example, tokenizer):
        return example
    return replace(example, correct=example.correct.lstrip(" "), wrong=example.wrong.lstrip(" "))


def _begins_without_space(example: Example, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template ends with a line break or space, after which models begin without one."""
    return chat_text(tokenizer, example.messages or (), str(example.where))[-1:].isspace()


def _written_end(example: Example) -> str:
    """The end of the text that the answer continues, where the author of the data wrote it and not a template."""
    if example.messages is None:
        return example.prompt
    return "" if _opens_turn(example) else example.messages[-1]["content"]


def _opens_turn(example: Example) -> bool:
    """Whether the answer begins the assistant's message in a chat."""
    return example.messages is not None and example.messages[-1]["role"] != "assistant"


def _counted(examples: Sequence[Example]) -> str:
    more = len(examples) - 1
    return str(examples[0].where) + (f" and {more} more row{'s' if more > 1 else ''}" if more else "")
