"""How the parameters of an intervention are laid out over the tokens and rows of one forward pass.

`patching.token_slots` decides which slot each token uses; this class reads the parameters by it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architectures.own_heads import OwnHeads


@dataclass(frozen=True)
class Placement:
    """How one forward pass reads the parameters [G, P, ...] of a layer; shared by all layers on one device.

    Args:
        index: int64 [R, T], the row that each token uses in a table of G·(P+1) rows, where the last of each group's
            P + 1 rows is zero. R is B, or 1 for all rows. None: no token differs from another.
        slot: the slot that every token uses; None: all slots as they are.
        group: int64 [B], the row group of each row, as `ops.scale_heads` takes it; with an index, the row of the index.
        heads: the heads that the activation has in this process, under tensor parallelism; None: all.
    """

    index: Tensor | None = None
    slot: int | None = None
    group: Tensor | None = None
    heads: OwnHeads | None = None

    def of(self, values: Tensor) -> Tensor:
        """values [G, P, ...] -> [G or R, 1 or T, ...], ready for `ops.scale_heads` with `self.group`."""
        if self.index is not None:
            trailing = values.shape[2:]
            # An empty slot for each group: [G·(P+1), ...]
            table = F.pad(values, (0, 0) * len(trailing) + (0, 1)).flatten(0, 1)
            # Indexing would sum the gradient with float atomics; a one-hot product would round under autocast.
            return F.embedding(self.index, table.reshape(table.shape[0], -1)).reshape(*self.index.shape, *trailing)
        if self.slot is not None:
            return values[:, self.slot : self.slot + 1]
        return values

    def steered(self, n_slots: int) -> Tensor | None:
        """Which tokens have a slot, bool [R, T]; None: all of them."""
        return None if self.index is None else self.index % (n_slots + 1) < n_slots

    def last(self, n_tokens: int) -> Placement:
        """The placement of the last tokens of the pass alone."""
        return self if self.index is None else replace(self, index=self.index[:, -n_tokens:])

    def to(self, device: torch.device) -> Placement:
        """The same placement on another device."""
        index, group = (
            None if tensor is None else tensor.to(device, non_blocking=True) for tensor in (self.index, self.group)
        )
        return Placement(index, self.slot, group, self.heads)


#: Every token uses the one slot that there is.
EVERYWHERE = Placement()
