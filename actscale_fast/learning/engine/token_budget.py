"""How many tokens fit in a pass: the memory that a pass keeps for its backward is counted once, on one prompt.

What layers save is not kept while it is counted, so that a prompt can be counted that would not fit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ...architectures.sharding import fsdp_mesh, local, storages

#: Share of the memory that is free when an engine opens.
SHARE_OF_FREE = 0.5
#: Peak memory of a pass, as a multiple of what autograd keeps: it includes temporary activations and gradients.
PEAK_OVER_KEPT = 1.5


class KeptBytes:
    """Counts the bytes that autograd would keep of the block, each storage once, except for those of some modules.

    What layers save is not kept, if `layer` wraps them, and then there is no backward pass. FSDP2 gathers the weights
    of a module just before it runs, so they are looked up once more then.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        roots = list(modules)
        self.modules = [module for root in roots for module in root.modules()]
        self.gathers = any(fsdp_mesh(root) is not None for root in roots)
        self.known: set[int] = set()
        self.found: dict[int, int] = {}
        self.layers: list[tuple[int, int]] = []  # of each layer: bytes of its input, bytes that are kept of the rest
        self._inside = False  # a layer
        self._alive: list[StorageWeakRef] = []  # so that no storage gets the identity of one that is gone
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

    @property
    def n_bytes_recomputed(self) -> int:
        """What is kept where each layer is computed again: their inputs, what is outside them, and one layer."""
        if not self.layers:
            return self.n_bytes
        inside = sum(rest for _, rest in self.layers)
        return self.n_bytes - inside + sum(given for given, _ in self.layers) + max(rest for _, rest in self.layers)

    def layer(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a layer, which is counted by itself; as `PartialForward.wrap_layer`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            before = self.n_bytes
            self._inside = True
            try:
                output = forward(*args, **kwargs)
            finally:
                self._inside = False
            given = args[0] if args else kwargs["hidden_states"]
            self.layers.append((given.numel() * given.element_size(), self.n_bytes - before))
            return output

        return run

    def _pack(self, tensor: Tensor) -> Tensor | None:
        for storage, n_bytes in storages(tensor):
            if storage not in self.known and storage not in self.found:
                self.found[storage] = n_bytes
                self._alive.append(StorageWeakRef(local(tensor).untyped_storage()))
        # A loss may run a backward pass of its own. An output kept by its own node would be a cycle, never freed.
        return None if self._inside else tensor.detach()


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
