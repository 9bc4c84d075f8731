"""How many tokens fit in a pass: what a pass keeps for its backward is counted once, on one prompt."""

from __future__ import annotations

from collections.abc import Iterable

import psutil
import torch
from torch import Tensor, nn

#: Of the memory that is free when an engine opens.
SHARE_OF_FREE = 0.5
#: What a pass holds at its peak over what autograd keeps for the backward: activations in flight and their gradients.
PEAK_OVER_KEPT = 1.5


class KeptBytes:
    """Counts the bytes that autograd saves inside the block, each storage once, without those of the modules given."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.known = {
            address
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
            for address, _ in _storages(tensor)
        }
        self.found: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> KeptBytes:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    @property
    def n_bytes(self) -> int:
        return sum(self.found.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        for address, n_bytes in _storages(tensor):
            if address not in self.known:
                self.found[address] = n_bytes
        return tensor.detach()  # an output that its own node keeps would be a cycle that nobody frees


def _storages(tensor: Tensor) -> list[tuple[int, int]]:
    """(address, bytes) of the memory behind a tensor: of a quantised or sharded one that of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
        return [one for part in parts if isinstance(part, Tensor) for one in _storages(part)]
    if tensor.is_meta:
        return []
    storage = tensor.untyped_storage()
    return [(storage.data_ptr(), storage.nbytes())]


def free_bytes(device: torch.device) -> int:
    """Of memory that nobody uses: on a GPU what the driver and PyTorch's own pool have left, else of the machine."""
    if device.type == "cuda":
        pooled = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + pooled
    return int(psutil.virtual_memory().available)


def tokens_that_fit(kept_bytes: int, n_tokens: int, budget: int) -> int:
    """The largest pass within a budget of bytes, where one of `n_tokens` keeps `kept_bytes`; at least one token."""
    per_token = max(PEAK_OVER_KEPT * kept_bytes / max(n_tokens, 1), 1.0)
    return max(int(budget / per_token), 1)
