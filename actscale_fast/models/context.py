"""What the edits must know of the forward pass they stand in: rows, padding, how much is prompt, how long the cache is.

The module that owns the layers sees all of it in its arguments, whoever calls it. A pre-hook there builds one `Context`
a patch and forward pass, shared by all layers and made without a synchronisation; generate() is wrapped on the instance
because only it knows where the prompt ends once a pass holds prompt and generated tokens together.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..interventions.positions import Placement, Prompt
from . import surgery
from .recompute import Carrier


@dataclass(eq=False)
class Context:
    """One patch's view of one forward pass."""

    placement: Placement | None  # None: this pass holds no token to edit
    strength: float | Tensor
    n_rows: int | None = None
    device: torch.device | None = None  # where the tensors of placement and strength lie; None: there are none
    elsewhere: dict[torch.device, Context] = field(default_factory=dict)

    def on(self, device: torch.device) -> Context:
        """The context for a layer on `device`; copied there once a forward pass."""
        if self.device is None or self.device == device:
            return self
        if device not in self.elsewhere:
            placement = None if self.placement is None else self.placement.to(device)
            strength = self.strength.to(device) if isinstance(self.strength, Tensor) else self.strength
            self.elsewhere[device] = Context(placement, strength, self.n_rows, device)
        return self.elsewhere[device]


@dataclass(frozen=True)
class Call:
    """The arguments of one forward pass that matter here."""

    n_rows: int
    n_tokens: int
    mask: Any  # as the model got it: a tensor, a dictionary of 4-D masks, or None
    cache: Any
    packed: bool
    prompt: Prompt | None  # as generate() or `Patch.prompt` announced it

    @property
    def past(self) -> int | Tensor:
        """Tokens in the KV cache: an int, or for a static cache a tensor on its device."""
        return 0 if self.cache is None else self.cache.get_seq_length()


class Contextual(Protocol):
    """A patch, as far as this file needs to know it."""

    context: Context | None

    def enter(self, call: Call) -> Context: ...
    def carriers(self) -> list[nn.Module]: ...


class Calls:
    """The patches of one model and the prompt they are in; lives on the module that owns the layers."""

    def __init__(self, decoder: nn.Module) -> None:
        self.patches: tuple[Contextual, ...] = ()
        self.prompt: Prompt | None = None
        self.names = argument_names(decoder)
        self.handles: dict[str, Any] = {
            "enter": decoder.register_forward_pre_hook(_enter, with_kwargs=True),
            "leave": decoder.register_forward_hook(_leave, always_call=True),
        }

    def clean(self, state: dict[str, Any]) -> None:
        pass

    @contextlib.contextmanager
    def announced(self, prompt: Prompt | None) -> Iterator[None]:
        """Let the forward passes inside know the prompt."""
        before = self.prompt
        self.prompt = prompt
        try:
            yield
        finally:
            self.prompt = before


def argument_names(decoder: nn.Module | type[nn.Module]) -> list[str]:
    """The names of what the module's forward takes, in order."""
    return [name for name in inspect.signature(decoder.forward).parameters if name != "self"]


class Generation:
    """The wrapped generate() of one model; lives on that model."""

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        self.handles: dict[str, Any] = {}
        self.there = model.__dict__.get("generate")  # another library's, on the instance
        model.__dict__["generate"] = _wrapped_generate(model, calls, self.there)

    def clean(self, state: dict[str, Any]) -> None:
        if self.there is None:
            state.pop("generate", None)
        else:
            state["generate"] = self.there


def join(decoder: nn.Module, model: nn.Module, patch: Contextual) -> Calls:
    """Add a patch to the model's calls; the first one hooks the decoder and wraps generate()."""
    calls: Calls | None = surgery.record_of(decoder)
    if calls is None:
        calls = Calls(decoder)
        surgery.mark(decoder, calls)
    if hasattr(model, "generate") and model is not decoder and surgery.record_of(model) is None:
        surgery.mark(model, Generation(model, calls))
    calls.patches += (patch,)
    return calls


def patches_of(decoder: nn.Module) -> tuple[Contextual, ...]:
    """The patches of a model, in the order in which they were applied."""
    calls: Calls | None = surgery.record_of(decoder)
    return () if calls is None else calls.patches


def part(decoder: nn.Module, patch: Contextual) -> bool:
    """Take a patch out of the calls; with the last one the decoder is as it was. Whether that is so now."""
    calls: Calls | None = surgery.record_of(decoder)
    if calls is None:
        return True
    calls.patches = tuple(other for other in calls.patches if other is not patch)
    if calls.patches:
        return False
    surgery.unmark(decoder)
    return True


def _enter(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    calls: Calls = surgery.record_of(decoder)
    call = read(calls.names, calls.prompt, args, kwargs)
    for patch in calls.patches:
        patch.context = patch.enter(call)
    if decoder.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        for patch in calls.patches:
            for layer in patch.carriers():
                Carrier.install(layer, calls)


def _leave(decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    for patch in surgery.record_of(decoder).patches:
        patch.context = None


def read(names: list[str], prompt: Prompt | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call of a forward pass from its arguments; `names` are those of the positional ones."""
    values = kwargs
    if args:
        values = {**dict(zip(names, args, strict=False)), **kwargs}
    tokens = values.get("input_ids")
    if tokens is None:
        tokens = values.get("inputs_embeds")
    if not isinstance(tokens, Tensor):
        raise ValueError("input_ids, inputs_embeds: got neither, expected one of them")
    return Call(
        n_rows=tokens.shape[0],
        n_tokens=tokens.shape[1],
        mask=values.get("attention_mask"),
        cache=values.get("past_key_values"),
        packed=values.get("cu_seq_lens_q") is not None,
        prompt=prompt,
    )


def _wrapped_generate(model: nn.Module, calls: Calls, there: Callable[..., Any] | None) -> Callable[..., Any]:
    """generate() of this instance, which says where the prompt ends before it begins."""
    reference = weakref.ref(model)  # the model holds this function: no cycle

    original: Callable[..., Any] = there or getattr(type(model), "generate")  # noqa: B009

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        model = reference()
        assert model is not None
        with calls.announced(_prompt_of(model, args, kwargs)):
            return there(*args, **kwargs) if there else original(model, *args, **kwargs)

    return generate


def _prompt_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt | None:
    """The prompt of a generate() call, its padding inferred as generate() itself infers it."""
    embeds = kwargs.get("inputs_embeds")
    ids = (
        args[0] if args else next((kwargs[key] for key in ("inputs", "input_ids") if kwargs.get(key) is not None), None)
    )
    tokens = embeds if embeds is not None else ids
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return Prompt(mask.shape[1], mask != 0)
    if not isinstance(tokens, Tensor):
        return None  # generate() starts from the beginning-of-sequence token or says what is wrong
    if tokens.dim() == 2 and not tokens.is_floating_point():
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
        pad, eos = (kwargs.get(key, getattr(config, key, None)) for key in ("pad_token_id", "eos_token_id"))
        ends = eos.tolist() if isinstance(eos, Tensor) else eos if isinstance(eos, list | tuple) else [eos]
        if pad is not None and int(pad) not in [int(end) for end in ends if end is not None]:
            padding = tokens == int(pad)
            if bool(padding.any()):
                return Prompt(tokens.shape[1], ~padding)
    return Prompt(tokens.shape[1])
