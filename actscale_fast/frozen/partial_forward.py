"""Running a part of a frozen model: some of its layers, the tokens after a cached prefix, and no output head.

The model's own forward pass does the work, so that embeddings, masks and rotary tables are those of its family. Each
layer's `forward` is a gate while the section is open: layers below the first that runs hand stored hidden states on,
layers from the end of the section on hand on what they get, and the head notes its input instead of making logits.
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

_HEAD = -1  # the key under which a section notes the head's input
KeysValues = tuple[Tensor, Tensor]  # [B, key-value heads, S, head_dim] each


class PartialForward:
    """Opens a model for partial runs; a context manager that leaves the model as it was.

    Args:
        found: the model's layout.
        head: its output head, as `OutputHead.module`; None: a run returns logits.
        call: what is called; a compiled wrapper of `found.model`, or that model.
        partial: whether layers may be left out. False: all of them run in every pass, which gives the same where what
            is left out would have given `hidden`.
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
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            for index, layer in enumerate(self.found.layers):
                undo.enter_context(replaced_forward(layer, _Gate(self, index, layer.forward)))
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
        """One forward pass of the layers first … end − 1. The first one of a section must be of all layers.

        Args:
            arguments: of the model's forward pass: the ids of the tokens after the prefix, the whole mask, a cache.
            first: the layers below it do not run; `hidden` [B, T, d] is what the last of them would have returned,
                before an edit of its output.
            end: the layers from it on do not run; None: all do, and the head's input is returned.
            prefix: keys and values of the tokens before.
            wanted: numbers of layers; what the layer below returned, before an edit of its output, is noted.
            every_token: without an end the head's input at every token, [B, T, d]; needs a head.

        Returns:
            (what layer end − 1 returned, before an edit of its output, [B, T, d]; without an end the head's input at
            the last token [B, d], or without a head the logits [B, V]), and the noted tensors [B, T, d].
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
            cache = {} if prefix is None else cache_arguments(self.found.model, prefix.cache(n_layers))
            output = self.call(**arguments | cache)
            if end is not None:
                return noted[end], noted
            return (output.logits[:, -1] if self.head is None else noted.pop(_HEAD)), noted
        finally:
            self.first, self.end, self.hidden, self.wanted, self.noted = 0, n_layers, None, (), {}
            if patches is not None:
                patches.leaves_out = before

    def _note_head(self, hidden: Tensor) -> Tensor:
        noted = hidden if self.every_token else hidden[:, -1]
        weight = getattr(self.head, "weight", noted)  # of a sharded model it may lie elsewhere
        self.noted[_HEAD] = noted if weight.is_meta else noted.to(weight.device)
        return hidden.new_zeros(hidden.shape[0], 1, 1)


class _Gate:
    """A layer's forward pass while a section is open."""

    calls_the_class = True  # to the layer's own; see `links`

    def __init__(self, section: PartialForward, index: int, original: Callable[..., Any]) -> None:
        self.section, self.index, self.original = section, index, original
        self.width: int | None = None  # items that the layer returns; 0: a tensor; None: not known yet
        self.kind: type = tuple

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        section, index = self.section, self.index
        if section.first <= index < section.end:
            output = self.original(*args, **kwargs)
            self.width = len(output) if isinstance(output, tuple | list) else 0
            self.kind = type(output)
            if index + 1 in section.wanted:
                section.noted[index + 1] = first_of(output)
            return output
        if self.width is None:
            raise RuntimeError("section: its first run must be of all layers, which shows what each of them returns")
        inputs = args[0] if args else kwargs["hidden_states"]
        if index == section.first - 1:
            assert section.hidden is not None
            inputs = section.hidden
        return self.kind((inputs, *[None] * (self.width - 1))) if self.width else inputs


class Prefix:
    """Keys and values of the first S columns of a batch, for the layers first … n_layers − 1.

    Args:
        first: the lowest layer that runs.
        layers: what each layer from it on keeps, [I, key-value heads, S, head_dim] twice, of I prompts.
        n_rows, n_columns: B and S. Row r is of prompt r mod I: B is I, or a multiple of it.
        device: of the embeddings.
    """

    def __init__(
        self, first: int, layers: Sequence[KeysValues], n_rows: int, n_columns: int, device: torch.device
    ) -> None:
        self.first, self.layers, self.n_rows = first, layers, n_rows
        # Layers that do not run have a length, which the masks ask for, and no memory.
        self.of_skipped = torch.zeros((), device=device).expand(n_rows, 1, n_columns, 1)

    def cache(self, n_layers: int) -> Any:
        """A cache of transformers that holds them; a run adds its own tokens to this cache and not to the prefix."""
        from transformers import DynamicCache

        # Without a config every layer keeps all columns, sliding windows included; the masks know the window.
        cache = DynamicCache()
        for index in range(n_layers):
            held = (self.of_skipped, self.of_skipped) if index < self.first else self.layers[index - self.first]
            cache.layers.append(prefix_layer()(*held, self.n_rows))
        return cache


@functools.cache
def prefix_layer() -> Any:
    """The class of a cache's layer that begins with a prefix; made when it is needed, as transformers is imported."""
    from transformers.cache_utils import DynamicLayer

    class PrefixLayer(DynamicLayer):
        """Keys and values [I, ·, S, ·] of a prefix, and those of a run [B, ·, T, ·], B a multiple of I."""

        keys: Tensor
        values: Tensor

        def __init__(self, keys: Tensor, values: Tensor, n_rows: int) -> None:
            super().__init__()
            self.lazy_initialization(keys, values)
            self.keys, self.values, self.times = keys, values, n_rows // keys.shape[0]

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> KeysValues:
            # One copy of the prefix, whatever the number of directions that share it.
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
    """What a cache of transformers holds of one layer."""
    layer = cache.layers[index]
    return layer.keys, layer.values
