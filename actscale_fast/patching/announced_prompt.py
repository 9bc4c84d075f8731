"""Which forward passes belong to the prompt that generate(), or the caller, has announced.

A prompt belongs to a sequence and not to the model. Logits processors, stopping criteria and guidance may run the same
model on other sequences meanwhile; these are told apart by their KV cache or, without one, by their tokens.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .forward_call import Call, Prompt

_GENERATE = str(Path("transformers", "generation", "utils.py"))


class AnnouncedPrompt:
    """A prompt and the sequence that it belongs to.

    Args:
        prompt: None: generate() found none to announce.
        tokens: the prompt's tokens, as generate() got them; None: not known.
        every_pass: the caller said that all passes inside belong to this sequence.
        alone: generate() was given nothing that may run the model on another sequence.
        inherited: the prompt comes from a generate() around this one, which this one continues.
    """

    def __init__(
        self,
        prompt: Prompt | None,
        tokens: Tensor | None = None,
        *,
        every_pass: bool = False,
        alone: bool = True,
        inherited: bool = False,
    ) -> None:
        self.prompt, self.tokens = prompt, tokens
        self.every_pass, self.alone, self.inherited = every_pass, alone, inherited
        self.begun = False
        self.foreign: Tensor | None = None  # the tokens of the last pass without a cache of another sequence
        self.cache: Any = None  # of the sequence
        self.first: Tensor | None = None  # ids or embeddings of its first pass, where it has no cache
        self._outside_of_graphs = _outside_of_graphs()

    def prompt_of(self, call: Call) -> Prompt | None:
        """The prompt that a pass belongs to; None: another sequence, or no prompt."""
        if self.prompt is None or self.every_pass:
            return self.prompt
        if torch.compiler.is_compiling():
            return self.prompt if self.alone else self._outside_of_graphs(self, call)
        return self._owned(call)

    def _owned(self, call: Call) -> Prompt | None:
        return self.prompt if self._owns(call) else None

    def _owns(self, call: Call) -> bool:
        owned = self._is_own(call)
        if not owned and call.cache is None:
            if self.foreign is not None and continues(call.tokens, self.foreign):
                raise ValueError(
                    "positions: another sequence than the one that is generated goes on without a KV cache, so that "
                    "its generated tokens cannot be told from its prompt; run it with a cache"
                )
            self.foreign = call.tokens
        return owned

    def _is_own(self, call: Call) -> bool:
        cache, ids = call.cache, self.tokens if call.tokens.dim() == 2 else None
        if not self.begun:  # generate() runs the prompt before anything else; a loop of the caller's may not
            if ids is not None and not _begins_with(call.tokens, ids) and not _begins_with(ids, call.tokens):
                return False
            self._refuse_added_tokens(call)
            self.begun, self.cache = True, cache
            self.first = call.tokens if cache is None else None
            return True
        if self.cache is not None:
            past = call.past if cache is not None else 0
            fresh = isinstance(past, int) and past == 0
            return cache is self.cache or (fresh and ids is not None and _begins_with(call.tokens, ids))
        assert self.first is not None
        if cache is not None:  # a model that creates its cache itself returns it after the first pass
            past = call.past
            if isinstance(past, int) and past != self.first.shape[1]:
                return False
            self.cache, self.first = cache, None
            return True
        return _begins_with(call.tokens, self.first)

    def _refuse_added_tokens(self, call: Call) -> None:
        """ValueError where the model got more tokens than generate() did: virtual tokens of a tuned prompt."""
        length = None if self.prompt is None or self.inherited or not self.alone else self.prompt.length
        if call.tokens.dim() == 3 and isinstance(length, int) and call.n_tokens > length:
            raise ValueError(
                f"positions: generate() was given {length} tokens, but the model got {call.n_tokens}: tokens were put "
                "before the prompt (prompt tuning?), so that its positions cannot be told"
            )


@functools.cache
def _outside_of_graphs() -> Callable[[AnnouncedPrompt, Call], Prompt | None]:
    """`AnnouncedPrompt._owned`, untraced by torch.compile; made late, because this imports all of the compiler."""
    return torch.compiler.disable(AnnouncedPrompt._owned)


def refuse_unannounced(call: Call) -> None:
    """ValueError where a generate() that announced no prompt is running and the pass does not show where it ends.

    With a cache, a prompt comes in one pass and is followed by one token at a time. Without a cache, or in chunks, only
    generate() knows where the prompt ends.
    """
    past = call.past
    cached = call.cache is not None or call.makes_cache
    if isinstance(past, int) and cached and (past == 0 or call.n_tokens == 1):
        return
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "generate" and code.co_filename.endswith(_GENERATE):
            raise ValueError(
                "positions: generate() was not called on the patched model itself, so that prompt and generated tokens "
                "cannot be told apart in this pass; patch the model that generates, and call its own generate()"
            )
        frame = frame.f_back  # type: ignore[assignment]


def continues(tokens: Tensor | None, first: Tensor | None) -> bool:
    """Whether a sequence is another one with more tokens after it."""
    if tokens is None or first is None or tokens.shape[1] <= first.shape[1]:
        return False
    return _begins_with(tokens, first)


def _begins_with(tokens: Tensor, first: Tensor) -> bool:
    """Whether ids or embeddings begin with others; rows may be repeated for beams."""
    length = first.shape[1]
    if tokens.dim() != first.dim() or tokens.shape[1] < length or tokens.shape[0] % first.shape[0]:
        return False
    again = first.repeat_interleave(tokens.shape[0] // first.shape[0], 0)
    return bool(torch.equal(tokens[:, :length], again.to(tokens)))
