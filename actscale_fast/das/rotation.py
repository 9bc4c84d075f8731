"""Learned rotations: orthogonal matrices as a function of free parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal


class Rotation(nn.Module):
    """A batch of orthogonal matrices `weight` [N, D, D], a function of the parameter `free` [N, D, D].

    weight = base · Cayley(free), with D(D − 1)/2 free numbers in each matrix. Of PyTorch's orthogonal parametrizations
    the Cayley map is the cheapest: it solves one linear system, about 3·D³ operations.
    """

    weight: Tensor

    def __init__(self, n_matrices: int, width: int, device: torch.device | None) -> None:
        super().__init__()
        self.shape = (n_matrices, width, width)
        self.weight = nn.Parameter(torch.eye(width, dtype=torch.float32, device=device).repeat(n_matrices, 1, 1))
        orthogonal(self, "weight", orthogonal_map="cayley")
        self._kept: tuple[object, Tensor] | None = None

    @property
    def free(self) -> Tensor:
        """What is learned; only the part below the diagonal counts."""
        return self.parametrizations.weight.original  # type: ignore[union-attr, return-value]

    @property
    def base(self) -> Tensor:
        """The constant factor."""
        return self.parametrizations.weight[0].base  # type: ignore[union-attr, index, return-value]

    def values(self) -> Tensor:
        """The matrices without gradient, computed only when `free` or `base` has changed since the last call."""
        state = [_state(tensor) for tensor in (self.free, self.base)]
        if self._kept is None or None in state or self._kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (state, self.weight.detach())
        return self._kept[1]

    @torch.no_grad()
    def set(self, matrices: Tensor) -> None:
        """Set the matrices, bit for bit.

        Raises:
            ValueError: they are not orthogonal.
        """
        matrices = matrices.to(self.base)
        identity = torch.eye(self.shape[-1], dtype=matrices.dtype, device=matrices.device)
        off = float((matrices @ matrices.mT - identity).abs().amax())
        if not off <= 1e-3:  # a learned rotation is off by about 1e-6
            raise ValueError(f"rotation: R·Rᵀ is off the identity by {off:.2g}, expected an orthogonal matrix")
        self.base.copy_(matrices)
        self.free.copy_(-identity)  # where PyTorch's parametrization begins; the diagonal does not count


def _state(tensor: Tensor) -> tuple[int, int, torch.device] | None:
    """A value that changes whenever the tensor does; None where PyTorch keeps no version count for it."""
    return None if tensor.is_inference() else (tensor._version, tensor.data_ptr(), tensor.device)
