"""Memory with guard bands: what a kernel leaves unwritten is NaN, and what it writes outside of its outputs is seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

#: Bytes before and after each tensor; a multiple of every alignment that a kernel asks for.
BAND = 512
#: All bits set: NaN in every floating type, −1 in the integers.
POISON = 0xFF

_new_empty = Tensor.new_empty
_empty, _empty_like, _empty_strided = torch.empty, torch.empty_like, torch.empty_strided


class Guard:
    """The tensors made within `outputs`, each between two bands."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int, int]] = []  # all bytes; where the tensor begins and ends

    def place(self, x: Tensor, offset: int = 0) -> Tensor:
        """A copy of `x` between two bands, with its strides, `offset` elements after an aligned address."""
        extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        copy = self.empty(extent if x.numel() else 0, x.shape, x.stride(), x.dtype, x.device, offset)
        with torch.no_grad():
            base = x.detach()
            if x.numel():  # elements that share memory are written more than once, with one value
                copy.as_strided((extent,), (1,), copy.storage_offset()).copy_(
                    base.as_strided((extent,), (1,), base.storage_offset())
                )
        return copy.requires_grad_(x.requires_grad)

    def empty(
        self, n_elements: int, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device,
        offset: int = 0,
    ) -> Tensor:  # fmt: skip
        """A poisoned tensor that spans `n_elements`."""
        begin = BAND + offset * dtype.itemsize
        end = begin + n_elements * dtype.itemsize
        buffer = torch.full((end + BAND,), POISON, dtype=torch.uint8, device=device)
        self._buffers.append((buffer, begin, end))
        made = _empty(0, dtype=dtype, device=device)
        return made.set_(buffer.untyped_storage(), begin // dtype.itemsize, tuple(shape), tuple(stride))  # type: ignore[call-overload,no-any-return]

    @contextlib.contextmanager
    def outputs(self) -> Iterator[None]:
        """Within it `torch.empty`, `empty_like`, `empty_strided` and `new_empty` return guarded tensors.

        The functions are replaced for the whole process: only for a process of verification's own.
        """

        def guarded(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def wrapper(*arguments: Any, **options: Any) -> Tensor:
                plain = make(*arguments, **options)
                if plain.requires_grad or plain.layout != torch.strided or plain.is_pinned():
                    return plain
                extent = sum((size - 1) * step for size, step in zip(plain.shape, plain.stride(), strict=True)) + 1
                span = extent if plain.numel() else 0
                return self.empty(span, plain.shape, plain.stride(), plain.dtype, plain.device)

            return wrapper

        torch.empty, torch.empty_like = guarded(_empty), guarded(_empty_like)  # type: ignore[assignment]
        torch.empty_strided = guarded(_empty_strided)  # type: ignore[assignment]
        Tensor.new_empty = guarded(_new_empty)  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.empty, torch.empty_like, torch.empty_strided = _empty, _empty_like, _empty_strided
            Tensor.new_empty = _new_empty  # type: ignore[method-assign]

    def broken(self) -> int:
        """How many bytes of the bands were written to."""
        written = 0
        for buffer, begin, end in self._buffers:
            for band in (buffer[:begin], buffer[end:]):
                written += int((band != POISON).sum())
        return written
