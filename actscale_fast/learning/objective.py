"""The three-term objective of a learned intervention: effectiveness, faithfulness, minimality."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from .. import defaults
from .._checks import finite_number, share_of
from ..interventions import ActivScalar, DynScalar, Intervention, SteerVec


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
        minimality: λ_M, the weight of the ℓ1 norm, which is applied as a proximal step, so that zeros are exact. A
            number, or a share such as "10%" of λ_max, the smallest weight that keeps every parameter at 0: the largest
            |gradient| of E + λ_F·F at 0 over the training examples (64 of them if there are more). A share means the
            same on models whose activations or logits have other scales; `fit` and `sweep` compute λ_max first, and
            return the objective with the number. "default": the default for the intervention, 5% for an ActivScalar
            and 0.3% for a SteerVec, a DynScalar or a sum with one. For others and with sparsity="scalars", where λ_max
            may not exist, it is the number 0.12.
        sparsity: whose ℓ1 norm is penalised. "parameters": that of the learned parameters. "scalars", for a DynScalar:
            that of the scalars it produces, Σ over layers and heads of the mean |⟨u, h⟩| over the steered tokens,
            averaged over prompts and directions. Its subgradient makes scalars small, but no probe exactly 0. The paper
            does not say which of the two it means.
        exclude_answers: take the KL over V∖{c, w}, renormalised; False: over all of V.
        kl: "forward" KL(p₀ ‖ p_s) or "reverse" KL(p_s ‖ p₀).
        directions: the signs of the strength: (1, −1) flips to the correct and to the wrong answer, (1,) only to the
            correct one.

    Raises:
        ValueError: a weight that is negative, not finite or not a number (booleans are not), a share that is not
            between 0% and 100% or is combined with sparsity="scalars", or an unknown choice.
    """

    margin: float = defaults.MARGIN
    faithfulness: float = defaults.FAITHFULNESS
    minimality: float | str = "default"
    exclude_answers: bool = True
    kl: Literal["forward", "reverse"] = "forward"
    directions: tuple[int, ...] = (1, -1)
    sparsity: Literal["parameters", "scalars"] = "parameters"

    def __post_init__(self) -> None:
        names = ("margin", "faithfulness", "minimality")
        for name in names[:2] if isinstance(self.minimality, str) else names:
            value = finite_number(getattr(self, name))
            if value is None or value < 0:
                more = ", or a share of λ_max such as '10%'" if name == "minimality" else ""
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a finite number >= 0{more}")
            object.__setattr__(self, name, value)
        if self.kl not in ("forward", "reverse"):
            raise ValueError(f"kl: got {self.kl!r}, expected 'forward' or 'reverse'")
        if self.sparsity not in ("parameters", "scalars"):
            raise ValueError(f"sparsity: got {self.sparsity!r}, expected 'parameters' or 'scalars'")
        if isinstance(self.minimality, str) and self.minimality != "default":
            _share(self.minimality)  # refuses other texts
            object.__setattr__(self, "minimality", "".join(self.minimality.split()))
            if self.sparsity == "scalars":
                raise ValueError(
                    f"minimality: got {self.minimality!r} with sparsity='scalars', which makes no parameter exactly 0, "
                    "so there is no λ_max to take a share of; expected a number"
                )
        directions = tuple(self.directions) if isinstance(self.directions, Iterable) else ()
        if directions not in ((1,), (-1,), (1, -1), (-1, 1)) or any(isinstance(sign, bool) for sign in directions):
            raise ValueError(f"directions: got {self.directions!r}, expected (1, -1), (1,) or (-1,)")
        object.__setattr__(self, "directions", tuple(map(int, directions)))

    @property
    def loss_options(self) -> LossOptions:
        return LossOptions(self.margin, KLOptions(**{name: getattr(self, name) for name in KLOptions._fields}))

    @property
    def minimality_share(self) -> float | None:
        """λ_M as a share of λ_max, between 0 and 1; None: it is a number, or the default."""
        return _share(self.minimality) if isinstance(self.minimality, str) and self.minimality != "default" else None

    @property
    def minimality_weight(self) -> float:
        """λ_M as a number.

        Raises:
            ValueError: it is a share, or the default, which only `fit` and `sweep` turn into a number.
        """
        if self.minimality == "default" and self.sparsity == "scalars":
            return defaults.NUMBER_MINIMALITY
        if isinstance(self.minimality, str):
            is_default = self.minimality == "default"
            what, then = ("", "call for_intervention first, or ") if is_default else ("the share ", "")
            raise ValueError(f"minimality: got {what}{self.minimality!r}, expected a number here; {then}pass a number")
        return self.minimality

    def for_intervention(self, intervention: Intervention) -> Objective:
        """This objective, with the default weight of the ℓ1 norm for an intervention if it has none of its own."""
        if self.minimality != "default":
            return self
        parts = intervention.singles
        are_known = all(isinstance(part, ActivScalar | SteerVec | DynScalar) for part in parts)
        if self.sparsity == "scalars" or not are_known:
            return replace(self, minimality=defaults.NUMBER_MINIMALITY)
        are_scalars = all(isinstance(part, ActivScalar) for part in parts)
        return replace(self, minimality=defaults.MINIMALITY if are_scalars else defaults.VECTOR_MINIMALITY)


def _share(text: str) -> float:
    """A share such as "10%" as a number between 0 and 1.

    Raises:
        ValueError: the text is not such a share.
    """
    share = share_of(text)
    if share is None:
        raise ValueError(
            f"minimality: got {text!r}, expected a finite number >= 0, or a share of λ_max from '0%' to '100%'"
        )
    return share
