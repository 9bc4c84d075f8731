"""Whether a whole site (attn_out, mlp_out, residual) is a stream of hidden states in which a change has an effect.

The site's output is left as it is in row 0, doubled in row 1 and negated in row 2; the rows must then differ after the
layer. Where doubling changes nothing, a norm follows that undoes it, and scalars cannot act there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.hooks import first_of, with_first
from .layout import ModelLayout
from .probe import N_TOKENS, Probe, Verdict

#: A site cannot act where doubling changes the stream by less than this share of what negating changes.
_IDLE = 0.02


class StreamProbe(Probe):
    """Asks about a site other than the head site."""

    def __init__(self, found: ModelLayout, modules: Mapping[int, nn.Module], site: str) -> None:
        super().__init__(found, modules)
        self.site = site
        self.n_rows = 3
        self.idle: set[int] = set()

    def verdict(self) -> Verdict:
        residual, last = self.site == "residual", self.found.n_layers - 1
        with self.watching(), contextlib.ExitStack() as hooks:
            for layer, module in self.modules.items():
                hooks.callback(module.register_forward_hook(self._changing(layer)).remove)
                if not residual:
                    hooks.callback(self.found.layers[layer].register_forward_hook(self._comparing(layer)).remove)
            output = self.run()
        self.refuse_unless_run_once()
        if residual and last not in self.reasons:
            final = output[0] if isinstance(output, tuple) else output.last_hidden_state
            if _is_idle(self.rows_of(final)):
                self.idle.add(last)
        return Verdict(self.reasons, frozenset(self.idle), frozenset(self.absent))

    def _changing(self, layer: int) -> Callable[..., Any]:
        """A hook on the site's module that doubles and negates rows of its output."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            self.uses[layer] += 1
            x = first_of(output)
            problem = _not_a_stream(x, self.n_rows * N_TOKENS, self.found.hidden_size)
            if problem:
                self.reasons.setdefault(layer, f"{type(module).__name__} returns {problem}")
                return None
            rows = self.rows_of(x)
            if self.site == "residual" and layer and _is_idle(rows):
                self.idle.add(layer - 1)  # doubling what the layer below returned made no difference to this one
            factors = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float32, device="cpu").to(rows)
            return with_first(output, (rows[:1] * factors.view(-1, *[1] * (rows.dim() - 1))).reshape(x.shape))

        return hook

    def _comparing(self, layer: int) -> Callable[..., Any]:
        """A hook on the layer that compares the rows after it, and hands on equal rows."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            x = first_of(output)
            axis = None if not isinstance(x, Tensor) or layer in self.reasons else self._row_axis(x)
            if axis is None:
                return None
            flat = x.shape[axis] != self.n_rows
            rows = self.rows_of(x) if flat else x.movedim(axis, 0)
            if _is_idle(rows):
                self.idle.add(layer)
            alike = rows[:1].expand_as(rows)
            alike = alike.reshape(x.shape) if flat else alike.movedim(0, axis)
            return with_first(output, alike.contiguous())

        return hook

    def _row_axis(self, x: Tensor) -> int | None:
        """The axis of the rows in what a layer returns, which in some families is several streams; None: not known."""
        if x.dim() == 2 and x.shape[0] == self.n_rows * N_TOKENS:
            return 0
        return next((axis for axis, size in enumerate(x.shape[:-1]) if size == self.n_rows), None)


def _not_a_stream(x: Any, n_tokens: int, width: int) -> str | None:
    """What x is where it is not a stream [B, T, d], nor [B·T, d] as in families that flatten rows and tokens."""
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    if x.dim() not in (2, 3) or x.shape[-1] != width or x.numel() != n_tokens * width:
        return f"a tensor {tuple(x.shape)}, not the stream of {width} numbers per token"
    return None


def _is_idle(rows: Tensor) -> bool:
    """Whether, in rows [as it is, doubled, negated], doubling changed nothing although negating did."""
    doubled, negated = ((rows[index] - rows[0]).double().norm() for index in (1, 2))
    return bool((doubled <= _IDLE * negated) & (negated > 0))  # a branch that is still 0 may act later
