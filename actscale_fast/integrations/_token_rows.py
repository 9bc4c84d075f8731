"""Parameters of several interventions in one table, and the row of the table that each token uses.

Shared by `serving` and the vLLM plug-in. All tensors keep their addresses, so that a forward pass that was compiled or
captured stays valid while their values change. Row 0 is the identity, which changes no bit of an activation.
"""

from __future__ import annotations

from torch import Tensor

from ..ops import dynamic_scale, scale_heads


def steer_heads(
    x: Tensor,
    index: Tensor,
    *,
    n_heads: int,
    alpha: Tensor,
    shift: Tensor | None = None,
    probes: Tensor | None = None,
) -> Tensor:
    """y = z·(1 + ⟨u, z⟩) with z = x·(1 + α) + v, where each token takes α, v and u from its own row.

    Args:
        x: the heads of N tokens side by side, [..., H·D].
        index: int64, the row of each token, of which the first N are read.
        n_heads: H.
        alpha: float32 [R, 1, H].
        shift: v, float32 [R, 1, H, D]; None: nothing is added.
        probes: u, float32 [R, H, D]; None: no factor that depends on the activation.

    Returns:
        A tensor of x's shape and dtype. Each of the two steps is computed in float32 and rounded once.
    """
    heads = x.reshape(-1, 1, n_heads, x.shape[-1] // n_heads)  # [N, 1, H, D]
    rows = index[: heads.shape[0]]
    heads = scale_heads(heads, alpha, shift=shift, group=rows)
    if probes is not None:
        heads = dynamic_scale(heads, probes, group=rows)
    return heads.view(x.shape)


def shift_tokens(x: Tensor, index: Tensor, shift: Tensor) -> Tensor:
    """x + v where each token takes v from its own row.

    Args:
        x: whole activations of N tokens, [..., D].
        index: int64, the row of each token, of which the first N are read.
        shift: v, float32 [R, 1, 1, D].

    Returns:
        A tensor of x's shape and dtype, computed in float32 and rounded once.
    """
    whole = x.reshape(-1, 1, 1, x.shape[-1])  # [N, 1, H=1, D]
    return scale_heads(whole, None, shift=shift, group=index[: whole.shape[0]]).view(x.shape)


def rank_heads(n_heads: int, rank: int, size: int) -> range:
    """The heads of one rank of a tensor-parallel group.

    Raises:
        ValueError: the heads cannot be divided evenly.
    """
    if n_heads % size:
        raise ValueError(f"heads: got {n_heads} heads for {size} ranks, expected a multiple")
    each = n_heads // size
    return range(rank * each, (rank + 1) * each)
