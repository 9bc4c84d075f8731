"""Head scalars for each request of a server, in buffers whose addresses never change.

A server flattens the tokens of all running requests into one axis, compiles its forward pass and replays it as a CUDA
graph, so only values in fixed buffers may change between steps. `ScalarTable` holds `alpha` [L, S, 1, H], with one slot
per intervention (slot 0 is the identity), and `index` [max_tokens], the slot of each token. The op is
`ops.scale_heads` with one row per token, y[n] = x[n]·(1 + alpha[layer, index[n]]), which reads and writes x once.
docs/serving.md shows where vLLM would call it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..architectures import site_check
from ..architectures.layout import layout
from ..architectures.location import ModelFingerprint
from ..interventions import ActivScalar, Intervention
from ..modules import hooks
from ..patching.edits import one_strength
from ._token_rows import steer_heads


class ScalarTable(nn.Module):
    """Scalars of several interventions and the slot of each token, in buffers of fixed addresses.

    Args:
        model: the fingerprint of the model that is served (`af.layout(model).fingerprint`, or an intervention's
            `location.model`).
        slots: S, including that of the identity.
        max_tokens: maximum number of tokens in one forward pass.
        heads: this rank's heads under tensor parallelism, e.g. range(rank * n, (rank + 1) * n); None: all.
        device: where the projections compute.

    Raises:
        ValueError: a size below 1 (slots: 2), or heads that the model does not have.

    Example:
        >>> table = ScalarTable(scalars.location.model, slots=8, max_tokens=8192)
        >>> with table.attached(model):
        ...     table.put(1, scalars, strength=-1.0)
        ...     table.assign([1, 0], [len_a, len_b])  # the first request is steered, the second is not
        ...     model(packed_tokens)
    """

    alpha: Tensor
    index: Tensor

    def __init__(
        self,
        model: ModelFingerprint,
        *,
        slots: int = 8,
        max_tokens: int = 8192,
        heads: range | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if slots < 2 or max_tokens < 1:
            raise ValueError(f"slots, max_tokens: got {slots}, {max_tokens}, expected at least 2 and 1")
        self.fingerprint = model
        self.heads = range(model.n_heads) if heads is None else heads
        if not len(self.heads) or self.heads.step != 1 or self.heads.start < 0 or self.heads.stop > model.n_heads:
            raise ValueError(f"heads: got {self.heads}, expected a range of 0 to {model.n_heads} in steps of 1")
        shape = (model.n_layers, slots, 1, len(self.heads))
        # Not in the state_dict, because a server loads its model's weights by name.
        self.register_buffer("alpha", torch.zeros(shape, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("index", torch.zeros(max_tokens, dtype=torch.int64, device=device), persistent=False)

    @torch.no_grad()
    def put(self, slot: int, intervention: Intervention, strength: float = 1.0) -> None:
        """Write an intervention's scalars, times β, into a slot; the next forward pass uses them.

        Raises:
            TypeError, ValueError: slot 0 or an unknown slot, an intervention for another model, or anything but
                unstacked scalars at the head site for all tokens.
        """
        self._check_slot(slot)
        if not isinstance(intervention, ActivScalar):
            raise TypeError(f"intervention: got {type(intervention).__name__}, expected an ActivScalar")
        where = intervention.location
        where.model.require(self.fingerprint)
        if where.site != "head" or where.positions is not None or intervention.n_groups is not None:
            raise ValueError("intervention: expected unstacked scalars at the head site with positions=None")
        intervention.check_finite()
        values = (
            one_strength(strength, "one number") * intervention.alpha[:, 0, self.heads.start : self.heads.stop]
        )  # [chosen layers, H]
        self.alpha[:, slot].zero_()
        self.alpha[list(where.layers), slot, 0] = values.to(self.alpha)

    def clear(self, slot: int) -> None:
        """Make a slot the identity again."""
        self._check_slot(slot)
        self.alpha[:, slot].zero_()

    def assign(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """Set the slot of each token in the next forward pass; tokens beyond the counts use slot 0.

        Args:
            slots: the slot of each request, in the order of their tokens.
            counts: the number of tokens of each request: its prompt's, or 1 while decoding.
        """
        if len(slots) != len(counts):
            raise ValueError(f"counts: got {len(counts)} for {len(slots)} slots, expected one for each")
        if slots and not 0 <= min(slots) <= max(slots) < self.alpha.shape[1]:
            raise ValueError(f"slots: got {min(slots)} to {max(slots)}, expected 0 to {self.alpha.shape[1] - 1}")
        total = sum(counts)
        if min(counts, default=0) < 0 or total > len(self.index):
            raise ValueError(f"counts: got {total} tokens, expected 0 to max_tokens = {len(self.index)}")
        cuda = self.index.is_cuda
        rows = torch.zeros(len(self.index), dtype=torch.int64, device="cpu", pin_memory=cuda)
        each, times = (torch.tensor(list(values), dtype=torch.int64, device="cpu") for values in (slots, counts))
        rows[:total] = torch.repeat_interleave(each, times)
        self.index.copy_(rows, non_blocking=cuda)

    def scale(self, x: Tensor, layer: int) -> Tensor:
        """Scale the heads of x [..., H·D], with at most max_tokens tokens and the H heads of this rank."""
        n_heads, width = len(self.heads), self.fingerprint.head_dim
        if x.shape[-1] != n_heads * width:
            raise ValueError(f"x: got {x.shape[-1]} channels, expected {n_heads} heads · {width} = {n_heads * width}")
        n_tokens = x.numel() // x.shape[-1]
        if n_tokens > self.index.shape[0]:
            raise ValueError(f"x: got {n_tokens} tokens, expected at most max_tokens = {self.index.shape[0]}")
        return steer_heads(x, self.index, n_heads=n_heads, alpha=self.alpha[layer])

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Scale the inputs of the attention's output projections of a transformers model while the context is open.

        Attach before the model is compiled or captured; the contents of the buffers may change at any time.
        """
        if len(self.heads) < self.fingerprint.n_heads:
            raise ValueError(f"heads: the table has {self.heads}, but a whole model has all {self.fingerprint.n_heads}")
        found = layout(model)
        self.fingerprint.require(found.fingerprint)
        site_check.require_site(found, "head", found.layers_of("head"))
        places = zip(found.layers_of("head"), found.projections, strict=True)
        edits = [(module, partial(self.scale, layer=layer)) for layer, module in places]
        try:
            for module, edit in edits:
                hooks.attach(module, edit, before=True)
            yield
        finally:
            for module, edit in edits:
                hooks.detach(module, edit)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        alpha = self.alpha
        super()._apply(fn, recurse)
        if self.alpha.dtype != alpha.dtype:  # model.half() must not change the table
            self.alpha = alpha.to(self.alpha.device)
        return self

    def _check_slot(self, slot: int) -> None:
        if not 0 < slot < self.alpha.shape[1]:
            raise ValueError(f"slot: got {slot}, expected 1 to {self.alpha.shape[1] - 1}; 0 is the identity")
