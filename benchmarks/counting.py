"""How many kernels one call launches, and the bytes they read and write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .case import Call

#: Ops that make memory or names and move nothing.
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "lift_fresh",
    "_reshape_alias", "set_", "resize_", "_local_scalar_dense", "is_same_size",
}  # fmt: skip
#: Ops that write their first argument without reading it.
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_"}


@dataclass(frozen=True)
class Counts:
    kernels: int
    n_bytes: int


class _Counter(TorchDispatchMode):
    """Counts the ops that reach PyTorch's dispatcher below autograd, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.n_bytes = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function._schema.name.split("::")[1]
        if function.is_view or name in _FREE:
            return result
        given = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
        written = [a for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        for argument in function._schema.arguments:
            if argument in written and name in _OVERWRITING:
                continue
            self.n_bytes += sum(_bytes_of(t) for t in _tensors(given.get(argument.name)))
        if written:
            self.n_bytes += sum(_bytes_of(t) for a in written for t in _tensors(given.get(a.name)))
        else:
            self.n_bytes += sum(_bytes_of(t) for t in _tensors(result))
        self.kernels += 1
        self.names.append(str(function._schema.name))
        return result


def counted(call: Call) -> Counts:
    """The kernels of one call and the bytes of their tensors, each op's inputs and outputs once.

    Counted at PyTorch's dispatcher, where its profiler's events come from too: an op is a kernel unless it is a view or
    only makes memory. A compiled variant's kernels are not seen.
    """
    with _Counter() as counter:
        call()
    return Counts(counter.kernels, counter.n_bytes)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _bytes_of(tensor: Tensor) -> int:
    """Of the distinct elements: an expanded dimension is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()
