"""Whether the projection's input is the heads side by side: scaled heads must arrive there with their factors.

Factors are powers of two, exact in every dtype. Row 0 keeps all heads as they are; each further row scales every head
by the factor for one digit of the head's number in base 8.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import cache_argument
from .attention_outputs import heads_changed, values_changed
from .layout import ModelLayout
from .own_heads import heads_in_process
from .probe import Probe, Verdict
from .sharding import tensor_parallel_mesh

_FACTORS = (2.0, 0.5, 4.0, 0.25, 8.0, 0.125, 16.0, 0.0625)
#: How far rows may differ beyond their factors, relative to their norm: sums are rounded in another order.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


class HeadProbe(Probe):
    """Asks about the head site."""

    def __init__(self, found: ModelLayout, modules: Mapping[int, nn.Module]) -> None:
        super().__init__(found, modules)
        self.sizes = {layer: self._own(layer, size) for layer in modules if (size := found.heads[layer]) is not None}
        self.n_rows = 1 + _digits(max((n_heads for n_heads, _ in self.sizes.values()), default=1))
        self.scaled: dict[int, Tensor] = {}  # the factors [rows, H] of the layers whose heads were scaled in this pass
        self.compared: set[int] = set()  # layers whose scaled heads have arrived at their projection

    def _own(self, layer: int, size: tuple[int, int]) -> tuple[int, int]:
        """(heads, their width) in this process."""
        if tensor_parallel_mesh(self.found.model) is None:
            return size
        return heads_in_process(self.modules[layer], size[0]), size[1]

    def verdict(self) -> Verdict:
        changes = {}
        for layer, size in self.sizes.items():
            for module in self._attention(layer):
                changes[module] = self._scaling(layer, size)
        with self.watching(), contextlib.ExitStack() as hooks:
            for layer, module in self.modules.items():
                hooks.callback(module.register_forward_pre_hook(self._comparing(layer)).remove)
            with heads_changed(changes):
                self.run()
            self.refuse_unless_run_once()
            rest = [layer for layer in self.modules if layer not in self.scaled and layer not in self.reasons]
            if rest:
                self._scale_values(rest)
        for layer in self.modules:
            if layer not in self.compared:
                self.reasons.setdefault(
                    layer,
                    "neither transformers' attention functions nor the KV cache exposes its heads, so their layout "
                    "before the projection cannot be verified",
                )
        return Verdict(self.reasons, frozenset(), frozenset(self.absent))

    def _attention(self, layer: int) -> list[nn.Module]:
        """The modules that the attention of a layer is made of."""
        block = self.found.layers[layer]
        return list(block.get_submodule(self.found.projection.partition(".")[0]).modules())

    def _scaling(self, layer: int, size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        """Scales what attention returns, [B, T, H, D]."""

        def change(heads: Tensor) -> Tensor:
            if heads.dim() != 4 or heads.shape[0] != self.n_rows or heads.shape[2:] != size:
                self.reasons.setdefault(
                    layer,
                    f"attention returns heads of shape {tuple(heads.shape[2:])}, but the projection's input was taken "
                    f"for {size[0]} heads of width {size[1]}",
                )
                return heads
            self.scaled[layer] = self._factors(size[0], heads)
            return heads * self.scaled[layer][:, None, :, None]

        return change

    def _scale_values(self, layers: list[int]) -> None:
        """Scale the values in the KV cache instead, for attention that does not use transformers' functions."""
        name = cache_argument(self.found.decoder)
        if name is None:
            return

        def change(layer: int, values: Tensor) -> Tensor:
            size = self.sizes.get(layer)
            if layer not in layers or size is None or values.dim() != 4 or size[0] % values.shape[1]:
                return values
            factors = self._factors(values.shape[1], values)
            self.scaled[layer] = factors.repeat_interleave(size[0] // values.shape[1], 1)  # query heads share them
            return values * factors[:, :, None, None]

        shown, self.scaled = self.scaled, {}  # in this pass no other layer is scaled
        try:
            self.run(**{name: values_changed(change, self.found.decoder), "use_cache": True})
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a family that does not understand this cache shows nothing
            pass
        self.scaled |= shown

    def _factors(self, n_heads: int, like: Tensor) -> Tensor:
        """[rows, H]; the first row is 1."""
        digits = [[1.0] * n_heads]
        for digit in range(self.n_rows - 1):
            digits.append([_FACTORS[head // 8**digit % 8] for head in range(n_heads)])
        return torch.tensor(digits, dtype=like.dtype, device=like.device)

    def _comparing(self, layer: int) -> Callable[..., Any]:
        """A hook that compares the projection's input with the factors, and hands on equal rows."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            self.uses[layer] += 1
            if not args:
                self.reasons[layer] = "its projection is called without a positional input"
                return None
            if layer not in self.scaled:
                return None
            rows = self.rows_of(args[0])
            self.compared.add(layer)
            problem = self._problem(rows, self.scaled[layer])
            if problem:
                self.reasons.setdefault(layer, problem)
            return (rows[:1].expand_as(rows).reshape(args[0].shape).contiguous(), *args[1:])

        return hook

    def _problem(self, rows: Tensor, factors: Tensor) -> str | None:
        """What is wrong with the projection's input [rows, ..., H·D] under factors [rows, H], or None."""
        n_heads = factors.shape[1]
        heads = rows.detach().reshape(self.n_rows, -1, n_heads, rows.shape[-1] // n_heads).double()
        expected = heads[:1] * factors.to(heads)[:, None, :, None]
        off = (heads - expected).norm(dim=(1, 3))  # [rows, H]
        size = expected.norm(dim=(1, 3))
        if not bool((size.isfinite() & (size > 0)).all()):
            self.sure = False
            return None
        bad = ~(off <= _TOLERANCE.get(rows.dtype, 0.05) * size).all(0)
        if not bool(bad.any()):
            return None
        return (
            f"something between its heads and the projection mixes or normalises them: a factor on head "
            f"{int(bad.int().argmax())} does not arrive as that factor at its place of the projection's input "
            f"({int(bad.sum())} of {n_heads} heads)"
        )


def _digits(n_heads: int) -> int:
    count = 1
    while 8**count < n_heads:
        count += 1
    return count
