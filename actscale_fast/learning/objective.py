"""The three-term objective of a learned intervention: effectiveness, faithfulness, minimality."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .. import defaults
from .._checks import finite_number


class KLOptions(NamedTuple):
    """How the KL is taken: fields of the objective, and keyword arguments of the losses and reference statistics."""

    exclude_answers: bool
    kl: Literal["forward", "reverse"]


class LossOptions(NamedTuple):
    """What the losses of a prompt depend on beside their tensors; losses with the same options are one call."""

    margin: float
    kl: KLOptions


@dataclass(frozen=True, slots=True)
class Objective:
    """L = E + λ_F·F + λ_M·‖α‖₁, averaged over prompts and summed over the directions of the strength.

    The paper (arXiv 2410.04962) states the three terms, the margin, the two weights and the ℓ1 norm. The hinge, the
    direction of the KL and the exclusion of the answers are this package's interpretation; each is a field.

    Args:
        margin: m in the hinge max(0, m − s·(z[c] − z[w])), in logits; for answers of several tokens the bracket is
            log p(c) − log p(w), in nats.
        faithfulness: λ_F, the weight of the KL divergence from the frozen model.
        minimality: λ_M, the weight of the ℓ1 norm, which is applied as a proximal step, so that zeros are exact.
        sparsity: whose ℓ1 norm is penalised. "parameters": that of the learned parameters. "scalars", for a DynScalar:
            that of the scalars it produces, Σ over layers and heads of the mean |⟨u, h⟩| over the steered tokens,
            averaged over prompts and directions. Its subgradient makes scalars small, but no probe exactly 0. The paper
            does not say which of the two it means.
        exclude_answers: take the KL over V∖{c, w}, renormalised; False: over all of V.
        kl: "forward" KL(p₀ ‖ p_s) or "reverse" KL(p_s ‖ p₀).
        directions: the signs of the strength: (1, −1) flips to the correct and to the wrong answer, (1,) only to the
            correct one.

    Raises:
        ValueError: a weight that is negative, not finite or not a number (booleans are not), or an unknown choice.
    """

    margin: float = defaults.MARGIN
    faithfulness: float = defaults.FAITHFULNESS
    minimality: float = defaults.MINIMALITY
    exclude_answers: bool = True
    kl: Literal["forward", "reverse"] = "forward"
    directions: tuple[int, ...] = (1, -1)
    sparsity: Literal["parameters", "scalars"] = "parameters"

    def __post_init__(self) -> None:
        for name in ("margin", "faithfulness", "minimality"):
            value = finite_number(getattr(self, name))
            if value is None or value < 0:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a finite number >= 0")
            object.__setattr__(self, name, value)
        if self.kl not in ("forward", "reverse"):
            raise ValueError(f"kl: got {self.kl!r}, expected 'forward' or 'reverse'")
        if self.sparsity not in ("parameters", "scalars"):
            raise ValueError(f"sparsity: got {self.sparsity!r}, expected 'parameters' or 'scalars'")
        directions = tuple(self.directions) if isinstance(self.directions, Iterable) else ()
        if directions not in ((1,), (-1,), (1, -1), (-1, 1)) or any(isinstance(sign, bool) for sign in directions):
            raise ValueError(f"directions: got {self.directions!r}, expected (1, -1), (1,) or (-1,)")
        object.__setattr__(self, "directions", tuple(map(int, directions)))

    @property
    def loss_options(self) -> LossOptions:
        return LossOptions(self.margin, KLOptions(**{name: getattr(self, name) for name in KLOptions._fields}))
