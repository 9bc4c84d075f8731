"""The head mask that transformers 5 dropped, for every attention implementation, with gradients."""

from __future__ import annotations

import functools
import weakref
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from ..ops import scale_heads
from . import surgery
from .adapter import layout

_SHAPES = "[H], [L, H] or [B, L, H]"


def head_mask(model: nn.Module, mask: Tensor) -> HeadMask:
    """Multiply each attention head's output by a factor: until the `with` block ends, or until `.remove()`.

    The factor stands at the input of the attention's output projection. That is what a mask on the attention's
    probabilities after the softmax does, without needing them: eager, SDPA, flash and flex attention give the same.
    A mask that requires a gradient gets it: at 1 its negative is the first-order change of the loss from removing a
    head (arXiv 1905.10650, eq. 2, before the absolute value).

    Args:
        model: a causal language model of Hugging Face; its weights may be frozen.
        mask: [H] for all layers, [L, H], or [B, L, H], one for each row of the batch (repeated for its beams in
            generate()); 1 keeps a head, 0 removes it. Any floating dtype, integers or bool. Read in each forward pass,
            so that an optimizer's step, or a change in place, takes effect with the next one.

    Returns:
        The handle: a context manager with `.remove()` and `.mask`.

    Raises:
        TypeError, ValueError: no tensor, another shape, a value that is not finite, or a model of an unknown family.

    Example:
        >>> mask = torch.ones(30, 9, requires_grad=True)
        >>> with head_mask(model, mask):
        ...     model(**inputs, labels=labels).loss.backward()
        >>> mask.grad  # [30, 9]
    """
    return HeadMask(model, mask)


class HeadMask:
    """An applied head mask; see `head_mask`."""

    def __init__(self, model: nn.Module, mask: Tensor) -> None:
        found = layout(model)
        self._n_layers, self._n_heads, self._width = found.n_layers, found.n_heads, found.head_dim
        self.mask = mask
        if not bool(torch.isfinite(mask).all()):  # once: setting a mask in a loop must not wait for the device
            raise ValueError("mask: some of its values are not finite")
        self._edits: list[tuple[weakref.ref[nn.Module], surgery.Edit]] = []
        try:
            for layer, module in enumerate(found.projections):
                edit = functools.partial(self._scale, layer)
                self._edits.append((weakref.ref(module), edit))
                surgery.attach(module, edit, before=True)
        except BaseException:
            self.remove()
            raise

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

    def _scale(self, layer: int, x: Tensor) -> Tensor:
        """x [B, T, H·D], or [B·T, H·D] where a family flattens rows and tokens."""
        mask = self._mask
        factors = mask if mask.dim() == 1 else mask[..., layer, :]
        alpha = (factors.to(x.device, torch.float32) - 1).view(-1, 1, self._n_heads)  # [1 or B, 1, H]
        n_rows = x.shape[0] if x.dim() == 3 else len(alpha)
        if len(alpha) > 1 and n_rows % len(alpha) == 0:
            alpha = alpha.repeat_interleave(n_rows // len(alpha), 0)
        heads = x.reshape(n_rows, -1, self._n_heads, self._width)
        if len(alpha) not in (1, n_rows):
            raise ValueError(f"mask: got {len(alpha)} rows for a batch of {n_rows}")
        return scale_heads(heads, alpha).view(x.shape)

    def remove(self) -> None:
        """Take the mask out of the model; nothing happens where it is out already, or the model is gone."""
        for reference, edit in self._edits:
            module = reference()
            if module is not None:
                surgery.detach(module, edit)
        self._edits.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
