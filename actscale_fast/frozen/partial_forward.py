"""Running part of a frozen model: some of its layers, the tokens after a cached prefix, and not the output head.

The model's own forward pass does the work, so embeddings, masks and rotary tables are those of its family. Meanwhile
the `forward` of each layer is replaced: layers below the first one pass on stored hidden states, layers from `end` on
pass on what they get, and the head stores its input instead of computing logits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..architectures.arguments import cache_argument
from ..architectures.layout import ModelLayout
from ..modules.hooks import first_of, record_of, replaced_forward

_HEAD = -1  # the key under which the head's input is stored
Forward = Callable[..., Any]
KeysValues = tuple[Tensor, Tensor]  # [B, key-value heads, S, head_dim] each


class PartialForward:
    """Runs a model in part; a context manager that leaves the model as it was.

    Args:
        found: the model's layout.
        head: its output head, as `OutputHead.module`; None: a run returns logits.
        call: what is called: `found.model`, or a compiled wrapper of it.
        partial: whether layers may be left out. False: all layers run in every pass, which gives the same result where
            the layers that could be left out would have returned `hidden`.
    """

    def __init__(
        self, found: ModelLayout, head: nn.Module | None, call: nn.Module | None = None, *, partial: bool = True
    ) -> None:
        self.partial = partial
        self.found, self.head = found, head
        self.call = found.model if call is None else call
        self.first = 0
        self.end = found.n_layers
        self.hidden: Tensor | None = None
        self.wanted: tuple[int, ...] = ()
        self.noted: dict[int, Tensor] = {}
        self.every_token = False
        #: Wraps the forward of each layer that runs with gradients, for a backward pass that computes it again.
        self.wrap_layer: Callable[[Forward], Forward] | None = None
        self.cache: Any = None  # that of the running pass, if it has a prefix
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            for index, layer in enumerate(self.found.layers):
                undo.enter_context(replaced_forward(layer, _LayerForward(self, index, layer)))
            if self.head is not None:
                undo.enter_context(replaced_forward(self.head, self._note_head))
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def run(
        self,
        arguments: dict[str, Any],
        *,
        first: int = 0,
        end: int | None = None,
        hidden: Tensor | None = None,
        prefix: Prefix | None = None,
        wanted: Sequence[int] = (),
        every_token: bool = False,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the layers first … end − 1. The first run must include all layers.

        Args:
            arguments: for the model's forward pass: the ids of the tokens after the prefix, and the whole mask.
            first: layers below it do not run; `hidden` [B, T, d] is what layer first − 1 would have returned, before
                any edit of its output.
            end: layers from it on do not run; None: all of them run.
            prefix: keys and values of the tokens before.
            wanted: numbers of layers whose input is returned too, before any edit of the output of the layer below.
            every_token: without `end`, return the head's input at every token that the model's head gets, [B, T, d], or
                without a head their logits [B, T, V].

        Returns:
            A result, and the wanted tensors [B, T, d] by layer. The result is what layer end − 1 returned, [B, T, d],
            before any edit of it; without `end`, the head's input at the last token [B, d], or without a head the
            logits [B, V].
        """
        n_layers = self.found.n_layers
        self.first, self.end, self.hidden = first, n_layers if end is None else end, hidden
        if not self.partial:
            self.first, self.end, self.hidden = 0, n_layers, None
        self.wanted = tuple(wanted) if end is None else (*wanted, end)
        self.noted, self.every_token = {}, every_token
        noted = self.noted
        patches = record_of(self.found.decoder)
        before = patches is not None and patches.leaves_out
        if patches is not None:
            patches.leaves_out = before or self.first > 0 or self.end < n_layers
        try:
            self.cache = None if prefix is None else prefix.cache(n_layers)
            cache = {} if prefix is None else cache_arguments(self.found.model, self.cache)
            output = self.call(**arguments | cache)
            if end is not None:
                return noted[end], noted
            if self.head is None:
                return (output.logits if every_token else output.logits[:, -1]), noted
            return noted.pop(_HEAD), noted
        finally:
            self.first, self.end, self.hidden, self.wanted, self.noted = 0, n_layers, None, (), {}
            self.cache = None
            if patches is not None:
                patches.leaves_out = before

    def _note_head(self, hidden: Tensor) -> Tensor:
        noted = hidden if self.every_token else hidden[:, -1]
        weight = getattr(self.head, "weight", noted)  # it may be on another device
        self.noted[_HEAD] = noted if weight.is_meta else noted.to(weight.device)
        return hidden.new_zeros(hidden.shape[0], 1, 1)


class _LayerForward:
    """The forward of a layer that runs, is left out, or starts from stored hidden states."""

    def __init__(self, run: PartialForward, index: int, layer: nn.Module) -> None:
        self.run, self.index, self.original = run, index, layer.forward
        self.wrapped_forward = layer.__dict__.get("forward")  # see `module_paths.own_forward`
        self.width: int | None = None  # items that the layer returns; 0: a tensor; None: not known yet
        self.kind: type = tuple

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run, index = self.run, self.index
        if run.first <= index < run.end:
            forward: Callable[..., Any] = self.original
            if run.wrap_layer is not None and torch.is_grad_enabled():
                forward = run.wrap_layer(
                    forward if run.cache is None else _repeatable(forward, run.cache.layers[index])
                )
            output = forward(*args, **kwargs)
            self.width = len(output) if isinstance(output, tuple | list) else 0
            self.kind = type(output)
            if index + 1 in run.wanted:
                run.noted[index + 1] = first_of(output)
            return output
        if self.width is None:
            raise RuntimeError(
                "partial forward: the first run must include all layers, which shows what each of them returns"
            )
        inputs = args[0] if args else kwargs["hidden_states"]
        if index == run.first - 1:
            assert run.hidden is not None
            inputs = run.hidden
        return self.kind((inputs, *[None] * (self.width - 1))) if self.width else inputs


def _repeatable(forward: Forward, cache_layer: Any) -> Forward:
    """A layer's forward that leaves its cache as it found it, so that it can run again."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before = cache_layer.keys, cache_layer.values, cache_layer.times
        try:
            return forward(*args, **kwargs)
        finally:
            cache_layer.keys, cache_layer.values, cache_layer.times = before

    return run


class Prefix:
    """Keys and values of the first S columns of a batch, for the layers first … n_layers − 1.

    Args:
        first: the lowest layer that runs.
        layers: the keys and values of each layer from it on, [I, key-value heads, S, head_dim] each, for I prompts.
        n_rows, n_columns: B and S. Row r belongs to prompt r mod I; B is a multiple of I.
        device: the device of the embeddings.
    """

    def __init__(
        self, first: int, layers: Sequence[KeysValues], n_rows: int, n_columns: int, device: torch.device
    ) -> None:
        self.first, self.layers, self.n_rows = first, layers, n_rows
        # Layers that do not run need a length, because the masks ask for it, but no memory.
        self.of_skipped = torch.zeros((), device=device).expand(n_rows, 1, n_columns, 1)

    def cache(self, n_layers: int) -> Any:
        """A transformers cache that holds them. A run adds its tokens to this cache and not to the prefix."""
        from transformers import DynamicCache

        # Without a config, layers with sliding windows keep all columns too; the masks know the window.
        cache = DynamicCache()
        for index in range(n_layers):
            held = (self.of_skipped, self.of_skipped) if index < self.first else self.layers[index - self.first]
            cache.layers.append(prefix_layer()(*held, self.n_rows))
        return cache


@functools.cache
def prefix_layer() -> Any:
    """The class of a cache layer that begins with a prefix; made on demand, because it imports transformers."""
    from transformers.cache_utils import DynamicLayer

    class PrefixLayer(DynamicLayer):
        """Keys and values [I, ·, S, ·] of a prefix, then those of a run [B, ·, T, ·]; B is a multiple of I."""

        keys: Tensor
        values: Tensor

        def __init__(self, keys: Tensor, values: Tensor, n_rows: int) -> None:
            super().__init__()
            self.lazy_initialization(keys, values)
            self.keys, self.values, self.times = keys, values, n_rows // keys.shape[0]

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> KeysValues:
            # The prefix is kept once, however many directions share it.
            self.keys = self._behind(self.keys, key_states)
            self.values = self._behind(self.values, value_states)
            self.times = 1
            return self.keys, self.values

        def _behind(self, kept: Tensor, new: Tensor) -> Tensor:
            shared = kept.expand(self.times, *kept.shape)
            return torch.cat([shared, new.unflatten(0, (self.times, -1))], 3).flatten(0, 1)

    return PrefixLayer


def cache_arguments(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The arguments that hand a KV cache to a model.

    Raises:
        ValueError: the model takes none.
    """
    name = cache_argument(model)
    if name is None:
        raise ValueError(f"model: {type(model).__name__} takes no KV cache")
    return {name: cache, "use_cache": True}


def keys_and_values(cache: Any, index: int) -> KeysValues:
    """The keys and values of one layer in a transformers cache."""
    layer = cache.layers[index]
    return layer.keys, layer.values
