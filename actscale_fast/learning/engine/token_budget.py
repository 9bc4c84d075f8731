"""How many tokens fit in a pass: the memory that a pass keeps for its backward is counted once, on one prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil
import torch
from torch import Tensor, nn

from ...architectures.sharding import fsdp_mesh, storages

#: Share of the memory that is free when an engine opens.
SHARE_OF_FREE = 0.5
#: Peak memory of a pass, as a multiple of what autograd keeps: it includes temporary activations and gradients.
PEAK_OVER_KEPT = 1.5


class KeptBytes:
    """Counts the bytes that autograd saves inside the block, each storage once, except for those of some modules.

    FSDP2 gathers the weights of a module just before it runs, so they are looked up once more then.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        roots = list(modules)
        self.modules = [module for root in roots for module in root.modules()]
        self.gathers = any(fsdp_mesh(root) is not None for root in roots)
        self.known: set[int] = set()
        self.found: dict[int, int] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> KeptBytes:
        with contextlib.ExitStack() as stack:
            for module in self.modules:
                self._note(module)
                if self.gathers and any(value is not None for value in module._parameters.values()):
                    stack.callback(module.register_forward_pre_hook(self._note).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def _note(self, module: nn.Module, args: object = None) -> None:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                self.known.update(storage for storage, _ in storages(tensor))

    @property
    def n_bytes(self) -> int:
        return sum(self.found.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        for storage, n_bytes in storages(tensor):
            if storage not in self.known:
                self.found[storage] = n_bytes
        return tensor.detach()  # an output kept by its own node would be a cycle that is never freed


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
