"""Reading the activations of a frozen model at a site; layers above the highest requested one do not run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from ..architectures.hugging_face import embedding_weight, input_device
from ..architectures.layout import layout
from ..architectures.location import check_layers, check_site
from ..architectures.own_heads import own_heads
from ..modules import hooks
from ..modules.evaluation_mode import evaluation_mode
from .batching import Batch, forward_arguments
from .partial_forward import PartialForward
from .shortcuts import open_frozen_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Reduce = Callable[[Tensor], Tensor]


class Reader:
    """Reads activations; a context manager that leaves the model as it was.

    While it is open, the model is frozen and in evaluation mode. Patches that were applied before stay in effect.

    Args:
        model: a Hugging Face causal language model.
        site: "head", "attn_out", "mlp_out" or "residual", as `Intervention.for_model` takes it.
        layers: numbers of layers, negative ones from the end; None: all layers.
        paths: module paths for a model of an unlisted family.
        split_heads: whether activations at the site "head" are split by heads; else H = 1.

    Raises:
        TypeError, ValueError: an unknown site or layer, or a family whose parts cannot be told apart.

    Example:
        >>> with Reader(model, "residual", layers=[5]) as read:
        ...     states = read(**tokenizer(["A text", "Another"], return_tensors="pt"))  # [1, 2, T, 1, hidden size]
    """

    def __init__(
        self, model: PreTrainedModel, site: str, layers: Iterable[int] | None, paths: dict[str, str] | None = None, *,
        split_heads: bool = True,
    ) -> None:  # fmt: skip
        self.found = layout(model, paths)
        self.site = check_site(site)
        self.layers = check_layers(layers, self.found.n_layers)
        self._modules = [self.found.site_module(site, layer) for layer in self.layers]
        self._n_heads = self.found.n_heads if site == "head" and split_heads else 1
        self._section: PartialForward | None = None
        self._noted: dict[int, Tensor] | None = None  # by index among the chosen layers; None: not reading
        self._n_rows = 0
        self._reduce: Reduce | None = None
        self._undo: contextlib.ExitStack | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.enter_context(evaluation_mode(self.found.model))
            for index, module in enumerate(self._modules):
                note = functools.partial(self._note, index)
                undo.callback(hooks.detach, module, note)
                hooks.attach(module, note, before=self.site == "head")
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        undo, self._undo, self._section = self._undo, None, None
        if undo is not None:
            undo.close()

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor | Batch, attention_mask: Tensor | None = None, *, reduce: Reduce | None = None
    ) -> Tensor:
        """Run the model and return the activations.

        Args:
            input_ids: int64 [B, T], padded on either side, or a `Batch`.
            attention_mask: [B, T], not 0 at real tokens; None: all tokens are real.
            reduce: maps the values of a layer [B, T, H, D] to what is kept of them, as soon as the layer has run;
                reading all layers then takes the memory of one.

        Returns:
            [L, B, T, H, D] in the model's dtype, with H = 1 at sites other than "head"; or the results of `reduce`,
            stacked. On the device of the first chosen layer. Values at padding are meaningless.

        Raises:
            RuntimeError: the reader is not open.
            TypeError, ValueError: ids or a mask of a wrong shape or type, ids that the model does not have, more tokens
                than its context holds, or a row that is all padding.
        """
        if self._undo is None:
            raise RuntimeError("reader: it is not open; use `with Reader(...) as read:`")
        batch = self._checked(input_ids, attention_mask)
        model: PreTrainedModel = self.found.model  # type: ignore[assignment]
        if self._section is None:
            # One token per row is enough to read the head and to see what each layer returns.
            one = Batch(batch.input_ids[:, :1], torch.ones_like(batch.input_ids[:, :1]), padded=False)
            arguments = forward_arguments(model, one)
            self._section = self._undo.enter_context(open_frozen_model(self.found, model, arguments))[1]
            self._section.run(arguments)
        noted: dict[int, Tensor] = {}
        self._noted, self._n_rows, self._reduce = noted, len(batch), reduce
        try:
            self._section.run(forward_arguments(model, batch), end=max(self.layers) + 1)
        finally:
            self._noted, self._reduce = None, None
        return torch.stack([noted[index].to(noted[0].device) for index in range(len(self.layers))])

    def _note(self, index: int, x: Tensor) -> Tensor:
        if self._noted is not None:
            value = x.detach()
            if value.dim() == 2:  # OPT flattens rows and tokens
                value = value.unflatten(0, (self._n_rows, -1))
            value = self._all_heads(index, value).unflatten(2, (self._n_heads, -1))  # [B, T, H, D]
            # A copy, because Falcon adds the MLP's output to the attention's in place.
            self._noted[index] = (value if self._reduce is None else self._reduce(value)).clone()
        return x

    def _all_heads(self, index: int, value: Tensor) -> Tensor:
        """The activation [B, T, ·] with the heads of all processes, under tensor parallelism."""
        sizes = self.found.heads[self.layers[index]] if self.site == "head" else None
        own = None if sizes is None else own_heads(self._modules[index], value.shape[-1], *sizes)
        return value if own is None else own.join(value, 2)

    def _checked(self, input_ids: Tensor | Batch, attention_mask: Tensor | None) -> Batch:
        if isinstance(input_ids, Batch):
            if attention_mask is not None:
                raise TypeError("attention_mask: a Batch has its own; give one or the other")
            return input_ids
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids: got {type(input_ids).__name__}, expected an int64 tensor [B, T] or a Batch")
        if input_ids.dim() != 2 or not input_ids.numel():
            raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, expected [B, T] with at least one token")
        context = self.found.max_context
        if context is not None and input_ids.shape[1] > context:
            raise ValueError(f"input_ids: got {input_ids.shape[1]} tokens, expected at most the model's {context}")
        embedding: Tensor = embedding_weight(self.found.model)
        lowest, highest = int(input_ids.min()), int(input_ids.max())
        if lowest < 0 or highest >= embedding.shape[0]:
            raise ValueError(f"input_ids: got {lowest} to {highest}, expected 0 to {embedding.shape[0] - 1}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask: got {shape}, expected {tuple(input_ids.shape)} like input_ids")
        real = mask != 0
        if not bool(real.any(-1).all()):
            raise ValueError(f"attention_mask: row {int(real.any(-1).int().argmin())} has no real token")
        device = input_device(self.found.model)
        return Batch(input_ids.to(device), real.to(device, torch.int64), padded=not bool(real.all()))
