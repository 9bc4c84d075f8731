"""How many tokens fit in a pass: the memory that a pass keeps for its backward is counted once, on one prompt."""

from __future__ import annotations

from collections.abc import Iterable

import psutil
import torch
from torch import Tensor, nn

#: Share of the memory that is free when an engine opens.
SHARE_OF_FREE = 0.5
#: Peak memory of a pass, as a multiple of what autograd keeps: it includes temporary activations and gradients.
PEAK_OVER_KEPT = 1.5


class KeptBytes:
    """Counts the bytes that autograd saves inside the block, each storage once, except for those of some modules."""

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
        return tensor.detach()  # an output kept by its own node would be a cycle that is never freed


def _storages(tensor: Tensor) -> list[tuple[int, int]]:
    """(address, bytes) of the memory behind a tensor, or behind the parts of a quantised or sharded one."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
        return [one for part in parts if isinstance(part, Tensor) for one in _storages(part)]
    if tensor.is_meta:
        return []
    storage = tensor.untyped_storage()
    return [(storage.data_ptr(), storage.nbytes())]


def free_bytes(device: torch.device) -> int:
    """Unused memory: on a GPU what the driver and PyTorch's own pool have left, else that of the machine."""
    if device.type == "cuda":
        pooled = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + pooled
    return int(psutil.virtual_memory().available)


def tokens_that_fit(kept_bytes: int, n_tokens: int, budget: int) -> int:
    """The tokens of the largest pass within a budget of bytes, if `n_tokens` keep `kept_bytes`; at least one."""
    per_token = max(PEAK_OVER_KEPT * kept_bytes / max(n_tokens, 1), 1.0)
    return max(int(budget / per_token), 1)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
