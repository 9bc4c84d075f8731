"""Chat messages: checked, and as the text that a tokenizer's chat template makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A conversation: messages with a "role" and a "content", both strings.
Messages: TypeAlias = Sequence[Mapping[str, str]]


def checked_messages(messages: Any, name: str = "messages") -> tuple[dict[str, str], ...]:
    """A conversation as plain dicts; keys of a message whose value is None are left out.

    Args:
        messages: a list of dicts with the keys "role" and "content".
        name: what an error message calls the argument.

    Raises:
        TypeError: not a list of dicts, or a role or content that is not a string.
        ValueError: no messages, or a message with other keys.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise TypeError(
            f"{name}: got {type(messages).__name__}, expected a list of messages with the keys 'role' and 'content'"
        )
    checked: list[dict[str, str]] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise TypeError(f"{name}: message {number} is a {type(message).__name__}, expected a dict")
        given = {key: value for key, value in message.items() if value is not None}
        if given.keys() != {"role", "content"}:
            raise ValueError(f"{name}: message {number} has the keys {list(given)}, expected 'role' and 'content'")
        for key, value in given.items():
            if not isinstance(value, str):
                raise TypeError(f"{name}: the {key} of message {number} is a {type(value).__name__}, expected a string")
        checked.append(given)
    if not checked:
        raise ValueError(f"{name}: got none, expected at least one message")
    return tuple(checked)


def user_message(text: str) -> tuple[dict[str, str], ...]:
    """A conversation of one message, from the user."""
    return ({"role": "user", "content": text},)


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer can write messages as text."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Messages, name: str) -> str:
    """A conversation in the tokenizer's chat template, up to where the assistant's next word begins.

    After a last message of the user or the system, this is the template's generation prompt; a last message of the
    assistant is left open, so that the answer continues it. The text has the template's special tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: checked messages.
        name: what an error message calls the conversation, such as "row 3 of data.jsonl".

    Raises:
        ValueError: the tokenizer has no chat template, or its template refuses these messages.
    """
    if not has_chat_template(tokenizer):
        raise ValueError(f"{name} has messages, but the tokenizer has no chat template; give a prompt as text instead")
    open_ended = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=not open_ended,
            continue_final_message=open_ended,
        )
    except ImportError:  # transformers' renderer is missing, which its message says
        raise
    except Exception as error:  # a template raises errors of its own, for example for a role that it does not know
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name}: the tokenizer's chat template refuses the messages ({reason})") from error
    return str(text)
