"""The head mask that transformers 5 dropped, for every attention implementation, with gradients."""

from __future__ import annotations

import weakref
from functools import partial

import torch
from torch import Tensor, nn

from ..architectures.layout import layout
from ..architectures.own_heads import own_heads
from ..interventions.placement import EVERYWHERE
from ..ops import scale_heads
from .forward_call import Call
from .forward_context import Context
from .patch import AttachedPatch
from .token_slots import per_row, refuse_several_sequences

_SHAPES = "[H], [L, H] or [B, L, H]"


def head_mask(
    model: nn.Module, mask: Tensor, *, projection: str | None = None, layers_path: str | None = None
) -> HeadMask:
    """Multiply each attention head's output by a factor: until the `with` block ends, or until `.remove()`.

    The factor acts at the input of the attention's output projection. It does what a mask on the attention's
    probabilities after the softmax does, without needing them: eager, SDPA, flash and flex attention give the same.
    A mask that requires a gradient gets one: at 1, its negative is the first-order change of the loss from removing a
    head (arXiv 1905.10650, eq. 2, before the absolute value).

    Args:
        model: a causal language model of Hugging Face; its weights may be frozen.
        mask: [H] for all layers, [L, H], or [B, L, H] with one mask per row of the batch (repeated for its beams in
            generate()). L counts the layers that have attention heads, which in hybrids are not all. H is the number
            of heads of the layer that has the most; layers with fewer ignore the rest. 1 keeps a head, 0 removes it.
            Any floating dtype, integers or bool. It is read in each forward pass, so an optimizer's step or a change
            in place takes effect with the next pass. It is applied as 1 + (mask − 1) in float32, like every scalar
            here, so a factor is exact to 6e-8. A mask that is computed from other tensors needs use_reentrant=False
            under gradient checkpointing: the reentrant kind would run back through its graph layer by layer, which
            PyTorch refuses.
        projection, layers_path: module paths for a family that is not in the table, as `for_model` takes them.

    Returns:
        The handle: a context manager with `.remove()` and `.mask`.

    Raises:
        TypeError, ValueError: not a tensor, a wrong shape, a value that is not finite, or a model of an unknown family.

    Example:
        >>> mask = torch.ones(30, 9, requires_grad=True)
        >>> with head_mask(model, mask):
        ...     model(**inputs, labels=labels).loss.backward()
        >>> mask.grad  # [30, 9]
    """
    paths = {"projection": projection, "layers_path": layers_path}
    return HeadMask(model, mask, {name: path for name, path in paths.items() if path is not None})


class HeadMask(AttachedPatch):
    """An applied head mask; see `head_mask`."""

    def __init__(self, model: nn.Module, mask: Tensor, paths: dict[str, str] | None = None) -> None:
        found = layout(model, paths)
        layers = found.chosen("head", None)
        modules = [found.site_module("head", layer) for layer in layers]
        self._sizes = [sizes for sizes in found.heads if sizes is not None]
        self._n_layers, self._n_heads = len(layers), max(n_heads for n_heads, _ in self._sizes)
        self.counted = tuple(range(len(layers)))
        self.mask = mask
        if not bool(torch.isfinite(mask).all()):  # once: setting a mask in a loop must not wait for the device
            raise ValueError("mask: some of its values are not finite")
        edits = [(module, partial(self._scale, index, weakref.ref(module))) for index, module in enumerate(modules)]
        self._attach(found, "head", layers, edits)

    @property
    def mask(self) -> Tensor:
        """The factors. Setting them takes effect with the next forward pass; their values are not checked then."""
        return self._mask

    @mask.setter
    def mask(self, value: Tensor) -> None:
        if not isinstance(value, Tensor) or value.is_complex():
            raise TypeError(f"mask: got {type(value).__name__}, expected a real tensor {_SHAPES}")
        expected = (self._n_layers, self._n_heads)[2 - min(value.dim(), 2) :]
        if not 1 <= value.dim() <= 3 or value.shape[-len(expected) :] != expected or not value.numel():
            raise ValueError(
                f"mask: got shape {tuple(value.shape)}, expected {_SHAPES} with H = {self._n_heads} and"
                f" L = {self._n_layers}"
            )
        self._mask = value

    @property
    def reads_arguments(self) -> bool:
        return self._mask.dim() == 3 and len(self._mask) > 1

    def context_of(self, call: Call) -> Context:
        """The context of one forward pass: its strength is the mask as it is now, [L or 1, H] or [B, L, H]."""
        mask = self._mask
        if self.reads_arguments:
            if call.packed:
                raise ValueError("mask: packed sequences have no rows; pad the batch, or give one mask for all rows")
            refuse_several_sequences("mask", call)
            mask = per_row("mask", mask, call)
        return self._context(mask, call.n_rows)

    def _context(self, mask: Tensor, n_rows: int | None) -> Context:
        factors = mask.to(torch.float32, copy=True)  # a change in place afterwards is for the next pass
        return Context(EVERYWHERE, factors if mask.dim() > 1 else factors[None], n_rows, mask.device)

    def _scale(self, index: int, projection: weakref.ref[nn.Module], x: Tensor) -> Tensor:
        context = self.context or self._context(self._mask, None)  # None: the layer runs by itself
        if context.placement is None:
            return x
        context.use(index)
        factors, (n_heads, width) = context.on(x.device).strength, self._sizes[index]
        assert isinstance(factors, Tensor)
        alpha = factors[..., min(index, factors.shape[-2] - 1), :n_heads].reshape(-1, 1, n_heads) - 1  # [1 or B, 1, H]
        rows = x.reshape(context.n_rows or len(alpha), -1, x.shape[-1])  # OPT flattens rows and tokens
        own = own_heads(projection(), x.shape[-1], n_heads, width)
        alpha = alpha if own is None else own.take(alpha, 2)
        return scale_heads(rows.unflatten(-1, (-1, width)), alpha).view(x.shape)
