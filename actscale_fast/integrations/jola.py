"""JoLA: joint localization and activation editing (Lai et al., arXiv 2502.01179), as an intervention.

    y = h ⊙ (1 + β·g_a·a) + β·g_v·v,  a and v in R^D for each head, before the attention's output projection
The gates g_a and g_v are hard-concrete (Louizos et al., arXiv 1712.01312): with noise u ~ U(ε, 1 − ε),
    s = σ((log u − log(1 − u) + log α) / τ) while sampling, σ(log α) otherwise;  g = clip(s·(ζ − γ) + γ, 0, 1)
    P(g > 0) = σ(log α − τ·log(−γ/ζ)),  τ = 0.33, γ = −0.1, ζ = 1.1 as in github.com/wenlai-lavine/jola at e2b73ce
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..architectures.location import Location
from ..interventions import Intervention
from ..interventions.placement import Placement
from ..ops import scale_channels, scale_heads

TEMPERATURE, LOW, HIGH, EPS = 0.33, -0.1, 1.1, 1e-6


class JoLA(Intervention):
    """Scales and vectors [L, P, H, D], and the log α of a gate for each [L, P, H]; all 0, which is the identity.

    In training mode gates are sampled in each pass and layer; in evaluation mode, the default, they are deterministic.
    """

    homogeneous: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eval()

    @classmethod
    def parameter_tails(cls, location: Location) -> dict[str, tuple[int, ...]]:
        heads, whole = (location.n_heads,), (location.n_heads, location.width)
        return {"scales": whole, "vectors": whole, "scale_gates": heads, "vector_gates": heads}

    def gate(self, log_alpha: Tensor) -> Tensor:
        """The gates, from 0 to 1, in the module's current mode."""
        if self.training:
            u = torch.empty_like(log_alpha).uniform_(EPS, 1 - EPS)
            log_alpha = (u.log() - (1 - u).log() + log_alpha) / TEMPERATURE
        return (log_alpha.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def open_probabilities(self) -> Tensor:
        """P(g > 0) of the scales' and the vectors' gates, [2, L, P, H]; their sum is the expected ℓ0 norm."""
        return (torch.stack(tuple(self.parameters())[2:]) - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid()

    def edit(self, x: Tensor, layer: int, strength: float | Tensor, placement: Placement) -> Tensor:
        a, v, gate_a, gate_v = (self.of_layer(value, layer, x.device) for value in self.parameters())
        scale = placement.of(a * self.gate(gate_a)[..., None])  # [G, P, H, D]
        shift = placement.of(v * self.gate(gate_v)[..., None])
        beta = strength.view(-1, 1, 1, 1) if isinstance(strength, Tensor) else strength
        factors = 1 + beta * (scale if placement.group is None else scale[placement.group])
        one = factors.shape[:2] == (1, 1)  # for all rows and tokens
        y = scale_channels(x.flatten(2), factors.flatten()).view_as(x) if one else (x * factors).to(x.dtype)
        return scale_heads(y, None, shift=shift, strength=strength, group=placement.group)
