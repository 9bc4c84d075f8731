"""Which prompt a forward pass belongs to while generate() runs, or while a caller has announced one.

Only generate() knows where the prompt ends once a pass holds prompt and generated tokens together, so it is wrapped on
the instance. A prompt belongs to a sequence and not to the model: what a logits processor, a stopping criterion or
guidance asks of the same model meanwhile is another sequence, told by its KV cache or, without one, by its tokens.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..architectures.arguments import argument_names
from ..interventions.positions import Prompt
from ..modules.module_paths import Links
from .forward_call import Call, cache_among

if TYPE_CHECKING:
    from .forward_context import Calls

#: Methods that run several requests in one row, in a thread of their own.
_BATCHED = ("generate_batch", "init_continuous_batching")
_GENERATE = str(Path("transformers", "generation", "utils.py"))
#: What a caller hands to generate() that may run the model on other sequences.
_FOREIGN = (
    "guidance_scale", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer",
    "custom_generate", "negative_prompt_ids", "assistant_model", "assistant_early_exit",
)  # fmt: skip


class Announced:
    """A prompt and the sequence that it belongs to.

    Args:
        prompt: None: generate() found none to announce.
        tokens: of the prompt, as generate() got them; None: not known.
        every_pass: all passes inside are of this sequence, because the caller said so.
        alone: nothing that was handed to generate() may run the model on another sequence.
    """

    def __init__(
        self, prompt: Prompt | None, tokens: Tensor | None = None, *, every_pass: bool = False, alone: bool = True
    ) -> None:
        self.prompt, self.tokens = prompt, tokens
        self.every_pass, self.alone = every_pass, alone
        self.inherited = False  # from a generate() around this one, whose prompt goes on
        self.begun = False
        self.foreign: Tensor | None = None  # what another sequence was asked without a cache, the last time
        self.cache: Any = None  # of the sequence
        self.first: Tensor | None = None  # ids or embeddings of its first pass, where it has no cache

    def prompt_of(self, call: Call) -> Prompt | None:
        """The prompt that a pass belongs to; None: the pass is of another sequence, or there is none."""
        if self.prompt is None or self.every_pass:
            return self.prompt
        if torch.compiler.is_compiling():
            if self.alone:
                return self.prompt
            return self._outside_of_graphs(call)
        return self.prompt if self._owns(call) else None

    @torch.compiler.disable
    def _outside_of_graphs(self, call: Call) -> Prompt | None:
        return self.prompt if self._owns(call) else None

    def _owns(self, call: Call) -> bool:
        owned = self._is_own(call)
        if not owned and call.cache is None:
            if self.foreign is not None and _goes_on(call.tokens, self.foreign):
                raise ValueError(
                    "positions: another sequence than the one that is generated goes on without a KV cache, so that "
                    "its generated tokens cannot be told from its prompt; run it with a cache"
                )
            self.foreign = call.tokens
        return owned

    def _is_own(self, call: Call) -> bool:
        cache, ids = call.cache, self.tokens if call.tokens.dim() == 2 else None
        if not self.begun:  # generate() runs the prompt before it asks anything else, a loop of the caller's may not
            if ids is not None and not _begins_with(call.tokens, ids) and not _begins_with(ids, call.tokens):
                return False
            self._refuse_added(call)
            self.begun, self.cache = True, cache
            self.first = call.tokens if cache is None else None
            return True
        if self.cache is not None:
            fresh = cache is None or call.past_is_zero
            return cache is self.cache or (fresh and ids is not None and _begins_with(call.tokens, ids))
        assert self.first is not None
        if cache is not None:  # a model that makes its cache by itself returns it after the first pass
            past = call.past
            if isinstance(past, int) and past != self.first.shape[1]:
                return False
            self.cache, self.first = cache, None
            return True
        return _begins_with(call.tokens, self.first)

    def _refuse_added(self, call: Call) -> None:
        """ValueError where the model is given more tokens than generate() was: virtual ones of a tuned prompt."""
        length = None if self.prompt is None or self.inherited or not self.alone else self.prompt.length
        if call.tokens.dim() == 3 and isinstance(length, int) and call.n_tokens > length:
            raise ValueError(
                f"positions: generate() was given {length} tokens, but the model got {call.n_tokens}: tokens were put "
                "before the prompt (prompt tuning?), so that its positions cannot be told"
            )


def refuse_unannounced(call: Call) -> None:
    """ValueError where generate() runs that does not say so to the patched model, and its passes cannot be told apart.

    With a cache a prompt comes in one pass and then one token at a time; without one, or in chunks, only generate()
    knows where the prompt ends.
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


class Generation:
    """The wrapped generate() of one model; lives on that model."""

    def __init__(self, model: nn.Module, calls: Calls, above: Links) -> None:
        #: The steps from the model to its decoder: an exchanged one would run without any of its hooks.
        self.above = above
        self.calls = calls
        self.handles: dict[str, Any] = {}
        self.names = argument_names(model)
        self.wrapped = hasattr(model, "generate")
        self.there = model.__dict__.get("generate")  # another library's, on the instance
        self.batched = [name for name in _BATCHED if hasattr(model, name) and name not in model.__dict__]
        if self.wrapped:
            model.__dict__["generate"] = _wrapped_generate(model, calls, self.there)
        for name in self.batched:
            model.__dict__[name] = _refusing(model, calls, name)

    def clean(self, state: dict[str, Any]) -> None:
        for name in self.batched:
            state.pop(name, None)
        if not self.wrapped:
            return
        if self.there is None:
            state.pop("generate", None)
        else:
            state["generate"] = self.there


def _refusing(model: nn.Module, calls: Calls, name: str) -> Callable[..., Any]:
    """A method of this instance that packs requests into rows, refused where rows or positions matter."""
    reference, original = weakref.ref(model), getattr(type(model), name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        if any(patch.reads_calls for patch in calls.patches):
            raise ValueError(
                f"{name}: continuous batching packs requests into rows, in which positions, strengths and groups of "
                "rows have no place; use generate()"
            )
        return original(reference(), *args, **kwargs)

    return method


def _wrapped_generate(model: nn.Module, calls: Calls, there: Callable[..., Any] | None) -> Callable[..., Any]:
    """generate() of this instance, which says where the prompt ends before it begins."""
    reference = weakref.ref(model)  # the model holds this function: no cycle

    original: Callable[..., Any] = there or getattr(type(model), "generate")  # noqa: B009

    names = [name for name in inspect.signature(original).parameters if name != "self"]

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        model = reference()
        assert model is not None
        with _announced_by_generate(model, calls, {**dict(zip(names, args, strict=False)), **kwargs}):
            return there(*args, **kwargs) if there else original(model, *args, **kwargs)

    return generate


@contextlib.contextmanager
def _announced_by_generate(model: nn.Module, calls: Calls, named: dict[str, Any]) -> Iterator[None]:
    config = named.get("generation_config")
    config = config if config is not None else getattr(model, "generation_config", None)

    def given(name: str) -> Any:
        value = named.get(name)
        return getattr(config, name, None) if value is None else value

    guidance = given("guidance_scale") not in (None, 1, 1.0)
    if guidance and given("use_cache") is False and any(patch.places_tokens for patch in calls.patches):
        raise ValueError(
            "use_cache: got False with guidance_scale; without a cache the tokens generated after the negative prompt "
            "cannot be told from it, so an intervention with positions would miss its place"
        )
    alone = not guidance and all(given(name) is None for name in _FOREIGN if name != "guidance_scale")
    prompt, tokens = _prompt_of(named, given)
    announced = Announced(prompt, tokens, alone=alone)
    outer = calls.announced
    if outer is not None and outer.prompt is not None and _goes_on(tokens, outer.tokens):
        # Drafts of the model for itself, say: the sequence goes on, and with it its prompt.
        announced = Announced(outer.prompt, outer.tokens, alone=alone)
        announced.inherited = True
    cache = cache_among(named)
    if cache is not None:
        announced.begun, announced.cache = True, cache
    before = calls.leaves_out
    calls.leaves_out = before or given("assistant_early_exit") is not None
    try:
        with calls.announcing(announced):
            yield
    finally:
        calls.leaves_out = before


def _prompt_of(named: dict[str, Any], given: Callable[[str], Any]) -> tuple[Prompt | None, Tensor | None]:
    """The prompt of a generate() call and its ids, its padding inferred as generate() itself infers it."""
    embeds = named.get("inputs_embeds")
    ids = next((named[key] for key in ("inputs", "input_ids") if named.get(key) is not None), None)
    tokens = embeds if embeds is not None else ids
    known = ids if isinstance(ids, Tensor) and ids.dim() == 2 and embeds is None else None
    mask = named.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return Prompt(mask.shape[1], mask != 0), known
    if not isinstance(tokens, Tensor):
        return None, None  # generate() starts from the beginning-of-sequence token or says what is wrong
    if tokens.dim() == 2 and not tokens.is_floating_point():
        pad, eos = given("pad_token_id"), given("eos_token_id")
        ends = eos.tolist() if isinstance(eos, Tensor) else eos if isinstance(eos, list | tuple) else [eos]
        if pad is not None and int(pad) not in [int(end) for end in ends if end is not None]:
            padding = tokens == int(pad)
            if bool(padding.any()):
                return Prompt(tokens.shape[1], ~padding), known
    return Prompt(tokens.shape[1]), known


def _goes_on(tokens: Tensor | None, first: Tensor | None) -> bool:
    """Whether a sequence is another one and more."""
    if tokens is None or first is None or tokens.shape[1] <= first.shape[1]:
        return False
    return _begins_with(tokens, first)


def _begins_with(tokens: Tensor, first: Tensor) -> bool:
    """Whether a sequence of ids or embeddings goes on where another one ends; rows may be repeated for beams."""
    length = first.shape[1]
    if tokens.dim() != first.dim() or tokens.shape[1] < length or tokens.shape[0] % first.shape[0]:
        return False
    again = first.repeat_interleave(tokens.shape[0] // first.shape[0], 0)
    return bool(torch.equal(tokens[:, :length], again.to(tokens)))
