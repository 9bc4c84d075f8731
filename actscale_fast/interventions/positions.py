"""Which parameter slot each token of a forward pass uses, and the parameters laid out token by token.

Positions count the real tokens of the prompt: 0 is its first, −1 its last; padding never counts, on either side.
Slot j belongs to the j-th listed position; one more slot, where it was asked for, to all generated tokens; the slot
after the last is the empty one, whose parameters are zero: nothing is done to the token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """How much of the sequence is prompt: its columns, padding included, and which of them hold real tokens."""

    length: int
    mask: Tensor | None = None  # [B, length] bool; None: all real


@dataclass(frozen=True)
class Placement:
    """How one forward pass reads the parameters [G, P, ...] of a layer: once for all layers, on one device."""

    index: Tensor | None = (
        None  # int64 [R, T]: row of the table [G·(P+1)] that each token uses; R = B, or 1 for all rows
    )
    slot: int | None = None  # every token uses this slot
    group: Tensor | None = None  # int64 [B]: the row group of each row, as `ops.scale_heads` takes it

    def of(self, values: Tensor) -> Tensor:
        """values [G, P, ...] -> [G or R, 1 or T, ...], ready for `ops.scale_heads` with `self.group`."""
        if self.index is not None:
            trailing = values.shape[2:]
            table = F.pad(values, (0, 0) * len(trailing) + (0, 1)).flatten(
                0, 1
            )  # [G·(P+1), ...], an empty slot a group
            # Indexing would sum the gradient with float atomics, a one-hot product would round under autocast.
            return F.embedding(self.index, table.reshape(table.shape[0], -1)).reshape(*self.index.shape, *trailing)
        if self.slot is not None:
            return values[:, self.slot : self.slot + 1]
        return values

    def steered(self, n_slots: int) -> Tensor | None:
        """Which tokens have a slot, bool [R, T]; None: all of them."""
        return None if self.index is None else self.index % (n_slots + 1) < n_slots

    def last(self, n_tokens: int) -> Placement:
        """The placement of the last tokens of the pass alone."""
        return self if self.index is None else Placement(self.index[:, -n_tokens:], self.slot, self.group)

    def to(self, device: torch.device) -> Placement:
        """The same placement on another device."""
        move = lambda tensor: None if tensor is None else tensor.to(device, non_blocking=True)  # noqa: E731
        return Placement(move(self.index), self.slot, move(self.group))


EVERYWHERE = Placement()


def slot_index(
    wanted: Tensor,
    n_tokens: int,
    *,
    past: int | Tensor,
    length: int | Tensor,
    mask: Tensor | None = None,
    generated: bool = False,
    separate: Tensor | None = None,
) -> Tensor:
    """The slot of each token of one forward pass, without a synchronisation.

    Args:
        wanted: int64 [P], the listed positions, negative from the prompt's last token.
        n_tokens: T, the tokens of this pass; they stand in columns past … past + T − 1.
        past: columns before them (the KV cache's length), an int or an int64 scalar tensor.
        length: columns of the prompt, padding included.
        mask: bool [B, ≥ length], real tokens of the prompt; None where all are.
        generated: whether the tokens after the prompt have a slot of their own, number P.
        separate: int64 [R, T], ascending numbers of the sequences that stand in a row, each a prompt of its own; R = B
            or 1. None: a row is one sequence. Only for a pass that holds the whole prompt.

    Returns:
        int64 [B, T] (B = 1 without a mask). P (P + 1 with `generated`) is the empty slot. A position outside a row's
        prompt marks nothing; where two fall on one token the first listed counts.
    """
    n_wanted = wanted.shape[0]
    columns = torch.arange(n_tokens, device=wanted.device) + past  # [T]
    in_prompt = (columns < length)[None]  # [1, T]
    count: int | Tensor = length
    rank = columns[None]  # [1, T]: the number of real tokens before this one
    if mask is not None:
        seen = mask.to(torch.int64).cumsum(-1)  # [B, S]
        within = columns.clamp(max=mask.shape[1] - 1)
        rank = seen[:, within] - 1  # [B, T]
        in_prompt = in_prompt & mask[:, within]
        count = seen[:, -1:]  # [B, 1]
    if separate is not None and mask is None:
        separate = separate.contiguous()
        start = torch.searchsorted(separate, separate)  # [R, T]: where each token's own sequence begins
        count = torch.searchsorted(separate, separate, right=True) - start  # [R, T]
        rank = torch.arange(n_tokens, device=wanted.device) - start
    empty = n_wanted + generated
    slots = torch.full_like(rank, empty)
    if n_wanted:
        total = count[..., None] if isinstance(count, Tensor) and count.dim() == 2 else count  # [B, 1 or T, 1]
        targets = torch.where(wanted < 0, wanted + total, wanted)  # [P] or [B, 1 or T, P]
        hit = (rank[:, :, None] == targets) & in_prompt[:, :, None]  # [B, T, P]
        slots = torch.where(hit, torch.arange(n_wanted, device=wanted.device), empty).amin(-1)
    if generated:
        slots = torch.where((columns >= length)[None], n_wanted, slots)
    return slots
