"""Sweeps over the heads of a TransformerBridge in a few batches, where the layers below each head run once.

A cell is one head that is patched or scaled (or one head at one position). One forward pass stores the residual stream
at every layer. Each batch of cells then starts at the layer of its cells: the blocks below return the stored residual.
With L layers this takes about (L + 1)/2L of the arithmetic of one forward pass per cell, in cells·B/rows passes.
TransformerLens' own `start_at_layer` would still run the blocks below and discard their results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import scale_heads

Metric = Callable[[Tensor], Tensor | float]
Setter = Callable[[Tensor, int, Tensor, Tensor], Tensor]
_HEADS = {"z": "n_heads", "q": "n_heads", "k": "n_key_value_heads", "v": "n_key_value_heads"}


def head_patching(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Any,
    metric: Metric,
    *,
    activation: str = "z",
    rows: int = 64,
    positions: bool = False,
) -> Tensor:
    """The metric when one head at a time receives its activation from the clean run.

    The values are those of `patching.get_act_patch_attn_head_out_all_pos` (with `positions`, `..._out_by_pos`), without
    a gradient.

    Args:
        model: a TransformerBridge in evaluation mode.
        corrupted_tokens: int64 [B, T].
        clean_cache: from `run_with_cache`, with `blocks.L.attn.hook_<activation>` [B, T, H, D] of every layer.
        metric: maps the logits [B, T, V] of one patched run to a scalar.
        activation: "z" (the heads' outputs), "q", "k" or "v".
        rows: maximum number of sequences per batch; each cell takes B of them.
        positions: use one cell for each head and position.

    Returns:
        fp32 [L, H], or [L, T, H] with `positions`.
    """
    check_model(model)
    if activation not in _HEADS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(_HEADS)}")
    n_heads = getattr(model.cfg, _HEADS[activation]) or model.cfg.n_heads
    name = f"attn.hook_{activation}"

    def patched(x: Tensor, layer: int, heads: Tensor, where: Tensor) -> Tensor:
        clean = clean_cache[f"blocks.{layer}.{name}"].to(x)  # [B, T, H, D]
        cells = torch.arange(len(heads), device=x.device)
        y = x.clone().view(len(heads), -1, *x.shape[1:])  # [cells, B, T, H, D]
        if positions:
            y[cells, :, where, heads] = clean[:, where, heads].transpose(0, 1)
        else:
            y[cells, :, :, heads] = clean[:, :, heads].permute(2, 0, 1, 3)
        return y.view_as(x)

    return _sweep(model, corrupted_tokens, metric, name, patched, n_heads, rows, positions)


def head_scaling(model: Any, tokens: Tensor, metric: Metric, *, factor: float = 0.0, rows: int = 64) -> Tensor:
    """The metric when one head at a time is multiplied by `factor`; 0 removes it.

    Args:
        model, metric, rows: as in `head_patching`.
        tokens: int64 [B, T].

    Returns:
        fp32 [L, H].
    """
    check_model(model)
    n_heads = model.cfg.n_heads

    def scaled(x: Tensor, layer: int, heads: Tensor, where: Tensor) -> Tensor:
        alpha = (factor - 1.0) * nn.functional.one_hot(heads, n_heads).float()
        group = torch.arange(len(heads), device=x.device).repeat_interleave(len(x) // len(heads))
        return scale_heads(x, alpha[:, None], group=group)

    return _sweep(model, tokens, metric, "attn.hook_z", scaled, n_heads, rows, False)


@torch.no_grad()
def _sweep(
    model: Any, tokens: Tensor, metric: Metric, name: str, setter: Setter, n_heads: int, rows: int, positions: bool
) -> Tensor:
    """The metric of every cell, [L, H] or [L, T, H]; `setter` edits [cells·B, T, H, D], cell by cell."""
    if model.training:
        raise ValueError("model: is in training mode, expected evaluation mode (model.eval())")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise ValueError(f"tokens: got {type(tokens).__name__}, expected a tensor of token ids [B, T]")
    if rows < 1:
        raise ValueError(f"rows: got {rows}, expected at least 1")
    tokens = tokens.to(model.cfg.device)
    n_rows, n_tokens = tokens.shape
    residuals, n_outputs = _residuals(model, tokens)
    n_cells, step = n_heads * (n_tokens if positions else 1), max(1, rows // n_rows)
    values = torch.zeros(model.cfg.n_layers, n_cells, dtype=torch.float32, device=tokens.device)
    for layer in range(model.cfg.n_layers):
        for first in range(0, n_cells, step):
            some = torch.arange(first, min(first + step, n_cells), device=tokens.device)
            where, heads = some // n_heads, some % n_heads

            def edit(x: Tensor, hook: Any, at: int = layer, h: Tensor = heads, w: Tensor = where) -> Tensor:
                return setter(x, at, h, w)

            with _from_layer(model, layer, residuals[layer].repeat(len(some), 1, 1), n_outputs):
                logits = model.run_with_hooks(
                    tokens.repeat(len(some), 1), fwd_hooks=[(f"blocks.{layer}.{name}", edit)], use_cache=False
                )
            for cell, one in enumerate(logits.split(n_rows), start=first):
                value = torch.as_tensor(metric(one))
                if value.dim():
                    raise ValueError(f"metric: returned shape {tuple(value.shape)}, expected a scalar")
                values[layer, cell] = value
    return values.view(-1, n_tokens, n_heads) if positions else values


def check_model(model: Any) -> None:
    """Raise a TypeError unless the model is a TransformerBridge."""
    from transformer_lens import TransformerBridge

    if not isinstance(model, TransformerBridge):
        raise TypeError(f"model: got {type(model).__name__}, expected a TransformerBridge")


def _residuals(model: Any, tokens: Tensor) -> tuple[list[Tensor], int | None]:
    """The residual stream that enters each block, and the number of outputs that a block returns (None: a tensor)."""
    kept: list[Tensor] = []
    outputs: list[int | None] = [None]
    last = model.cfg.n_layers - 1

    def count(block: nn.Module, args: Any, output: Any) -> None:
        outputs.append(len(output) if isinstance(output, tuple) else None)

    handle = model.blocks[0].register_forward_hook(count)
    keep = [(f"blocks.{layer}.hook_in", lambda x, hook: kept.append(x)) for layer in range(last)]
    try:
        kept.append(model.run_with_hooks(tokens, fwd_hooks=keep, stop_at_layer=last, use_cache=False))
    finally:
        handle.remove()
    return kept, outputs[-1]


@contextlib.contextmanager
def _from_layer(model: Any, layer: int, residual: Tensor, n_outputs: int | None) -> Iterator[None]:
    """Let every block below a layer return this residual while the context is open."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return residual if n_outputs is None else (residual, *[None] * (n_outputs - 1))

    below = list(model.blocks)[:layer]
    try:
        for block in below:
            block.__dict__["forward"] = forward
        yield
    finally:
        for block in below:
            block.__dict__.pop("forward", None)
