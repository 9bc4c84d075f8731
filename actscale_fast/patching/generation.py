"""generate() of a patched model, wrapped so that it announces the prompt before it runs.

Only generate() knows where the prompt ends once a pass holds prompt and generated tokens together.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..architectures.arguments import argument_names
from ..modules.hooks import Record
from ..modules.module_paths import ModulePaths
from .announced_prompt import AnnouncedPrompt, continues
from .forward_call import Prompt, cache_among
from .forward_context import ModelPatches

#: Methods that run several requests in one row, in a thread of their own.
_BATCHED = ("generate_batch", "init_continuous_batching")
#: Arguments of generate() that may run the model on other sequences.
_FOREIGN = (
    "guidance_scale", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer",
    "custom_generate", "negative_prompt_ids", "assistant_model", "assistant_early_exit",
)  # fmt: skip


class WrappedGenerate(Record):
    """The wrapped generate() of a model; kept on that model.

    Args:
        model: the model.
        model_patches: its patches.
        decoder_path: the path to its decoder; an exchanged decoder would run without any of its hooks.
    """

    def __init__(self, model: nn.Module, model_patches: ModelPatches, decoder_path: ModulePaths) -> None:
        super().__init__()
        self.decoder_path, self.model_patches = decoder_path, model_patches
        self.names = argument_names(model)
        self.wrapped = hasattr(model, "generate")
        self.there = model.__dict__.get("generate")  # set on the instance by another library
        self.batched = [name for name in _BATCHED if hasattr(model, name) and name not in model.__dict__]
        if self.wrapped:
            model.__dict__["generate"] = _announcing(model, model_patches, self.there)
        for name in self.batched:
            model.__dict__[name] = _refusing(model, model_patches, name)

    def clean(self, state: dict[str, Any]) -> None:
        for name in self.batched:
            state.pop(name, None)
        if not self.wrapped:
            return
        if self.there is None:
            state.pop("generate", None)
        else:
            state["generate"] = self.there


def _refusing(model: nn.Module, model_patches: ModelPatches, name: str) -> Callable[..., Any]:
    """A method that packs several requests into one row, refused where rows or positions matter."""
    reference, original = weakref.ref(model), getattr(type(model), name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        if any(patch.reads_arguments for patch in model_patches.patches):
            raise ValueError(
                f"{name}: continuous batching packs requests into rows, in which positions, strengths and groups of "
                "rows have no place; use generate()"
            )
        return original(reference(), *args, **kwargs)

    return method


def _announcing(model: nn.Module, model_patches: ModelPatches, there: Callable[..., Any] | None) -> Callable[..., Any]:
    """The generate() of this model, with the prompt announced around it."""
    reference = weakref.ref(model)  # the model holds this function, so a strong reference would make a cycle
    original: Callable[..., Any] = there or getattr(type(model), "generate")  # noqa: B009
    names = [name for name in inspect.signature(original).parameters if name != "self"]

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        model = reference()
        assert model is not None
        with _announced(model, model_patches, {**dict(zip(names, args, strict=False)), **kwargs}):
            return there(*args, **kwargs) if there else original(model, *args, **kwargs)

    return generate


@contextlib.contextmanager
def _announced(model: nn.Module, model_patches: ModelPatches, named: dict[str, Any]) -> Iterator[None]:
    config = named.get("generation_config")
    config = config if config is not None else getattr(model, "generation_config", None)

    def given(name: str) -> Any:
        value = named.get(name)
        return getattr(config, name, None) if value is None else value

    guidance = given("guidance_scale") not in (None, 1, 1.0)
    if guidance and given("use_cache") is False and any(patch.reads_positions for patch in model_patches.patches):
        raise ValueError(
            "use_cache: got False with guidance_scale; without a cache the tokens generated after the negative prompt "
            "cannot be told from it, so an intervention with positions would miss its place"
        )
    alone = not guidance and all(given(name) is None for name in _FOREIGN if name != "guidance_scale")
    prompt, tokens = _prompt_of(named, given)
    announced = AnnouncedPrompt(prompt, tokens, alone=alone)
    outer = model_patches.announced
    if outer is not None and outer.prompt is not None and continues(tokens, outer.tokens):
        # A model that drafts for itself, for example: the sequence goes on, and its prompt stays the same.
        announced = AnnouncedPrompt(outer.prompt, outer.tokens, alone=alone, inherited=True)
    cache = cache_among(named)
    if cache is not None:
        announced.begun, announced.cache = True, cache
    before = model_patches.leaves_out
    model_patches.leaves_out = before or given("assistant_early_exit") is not None
    try:
        with model_patches.announcing(announced):
            yield
    finally:
        model_patches.leaves_out = before


def _prompt_of(named: dict[str, Any], given: Callable[[str], Any]) -> tuple[Prompt | None, Tensor | None]:
    """The prompt of a generate() call and its ids, with the padding inferred as generate() itself infers it."""
    embeds = named.get("inputs_embeds")
    ids = next((named[key] for key in ("inputs", "input_ids") if named.get(key) is not None), None)
    tokens = embeds if embeds is not None else ids
    known = ids if isinstance(ids, Tensor) and ids.dim() == 2 and embeds is None else None
    mask = named.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return Prompt(mask.shape[1], mask != 0), known
    if not isinstance(tokens, Tensor):
        return None, None  # generate() starts from the beginning-of-sequence token, or reports what is wrong
    if tokens.dim() == 2 and not tokens.is_floating_point():
        pad, eos = given("pad_token_id"), given("eos_token_id")
        ends = eos.tolist() if isinstance(eos, Tensor) else eos if isinstance(eos, list | tuple) else [eos]
        if pad is not None and int(pad) not in [int(end) for end in ends if end is not None]:
            padding = tokens == int(pad)
            if bool(padding.any()):
                return Prompt(tokens.shape[1], ~padding), known
    return Prompt(tokens.shape[1]), known
