"""The systems that the report compares, and the settings that are tried for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

from ..architectures.layout import layout
from ..architectures.site_after_norm import site_after_norm
from ..architectures.site_check import idle_layers, running_layers
from ..interventions import ActivScalar, DynScalar, Intervention, SteerVec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: "A few": the share of the heads (or of the vectors per site and position) that may be scaled.
FEW = 0.2
#: The two sites of the paper's main comparison.
_SITES = ("attn_out", "mlp_out")


@dataclass(frozen=True, slots=True)
class System:
    """A kind of intervention, where it acts, and how it is fitted."""

    name: str
    title: str
    cls: type[Intervention]
    aligned: bool  # learned on prompts of one length with aligned tokens
    sites: tuple[str, ...] = ("head",)
    few: bool = False  # chosen by a path of ℓ1 weights, then fitted without it, with `FEW` of the scalars
    tuned_as: str = ""  # the system whose settings it takes

    def make(self, model: PreTrainedModel, n_tokens: int) -> Intervention:
        """A new intervention, its parts in the order of `sites`; `n_tokens` is the length of the aligned prompts."""
        positions = range(n_tokens) if self.aligned and not self.cls.shares_positions else None
        parts: Iterable[Intervention] = [
            self.cls.for_model(model, **self.place(model, site), positions=positions) for site in self.sites
        ]
        return reduce(lambda first, second: first + second, parts)

    def place(self, model: PreTrainedModel, site: str) -> dict[str, Any]:
        """The arguments of `for_model` for a site; for factors that a norm undoes there, that norm's output."""
        found = layout(model)
        layers = running_layers(found, site, found.chosen(site, None))
        norm = site_after_norm(found, site, idle_layers(found, site, layers)) if self.cls.multiplies else None
        return {"site": site} if norm is None else {"site": "mlp_out", "mlp": norm}

    @property
    def any_length(self) -> bool:
        """Whether what was learned applies to prompts of any length."""
        return not self.aligned or self.cls.shares_positions


SYSTEMS = (
    System("scalars", "ActivScalar per head", ActivScalar, False),
    System(
        "few-scalars", f"ActivScalar, {FEW:.0%} of the heads, refit", ActivScalar, False, few=True, tuned_as="scalars"
    ),
    System("vectors", "SteerVec per head", SteerVec, False),
    System("probes", "DynScalar per head", DynScalar, True),
    System("scalars-by-position", "ActivScalar per site and position", ActivScalar, True, _SITES),
    System("vectors-by-position", "SteerVec per site and position", SteerVec, True, _SITES),
)  # fmt: skip


def system_named(name: str) -> System:
    """The system of this name."""
    return next(system for system in SYSTEMS if system.name == name)


def few_of(intervention: Intervention) -> int:
    """How many of an intervention's scalars are a few."""
    return max(int(FEW * intervention.n_parameters), 2)
