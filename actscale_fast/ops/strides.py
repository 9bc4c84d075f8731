"""How the activations that are scaled lie in memory."""

from __future__ import annotations

from torch import Tensor


def rows_of(x: Tensor) -> tuple[int, int, int]:
    """(N, d, the stride of rows) of x [..., d]: contiguous, or [N, d] with unit stride over d; ValueError otherwise."""
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    if x.is_contiguous():
        return rows, width, width
    if x.dim() == 2 and (x.stride(1) == 1 or width <= 1):
        return rows, width, x.stride(0)
    raise ValueError(f"x: got strides {x.stride()}, expected contiguous or [N, d] with stride 1 over d")


def gradient_rows(dy: Tensor) -> tuple[Tensor, int]:
    """dy [..., d] as rows of unit stride, and the stride between them; copied where it does not lie so."""
    if dy.is_contiguous():
        return dy, dy.shape[-1]
    dy = dy.flatten(0, -2) if dy.dim() > 2 else dy.unsqueeze(0) if dy.dim() == 1 else dy
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    return dy, dy.stride(0)


def require_unit_stride(x: Tensor) -> None:
    """Refuse strides that the kernels do not follow; the public functions make such an x contiguous.

    An empty x may have any strides: PyTorch calls it contiguous, and `contiguous()` keeps them.
    """
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
        raise ValueError(f"x: got strides {x.stride()}, expected 1 over the last axis; call contiguous() first")
