"""Checks of the arguments that `fit`, `sweep`, `attribution` and `minimality_path` share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..architectures.hugging_face import unwrap
from ..architectures.layout import layout
from ..architectures.location import Location
from ..architectures.site_after_norm import offer_of_site_after_norm
from ..architectures.site_check import idle_layers
from ..interventions import Composite, Intervention, Projection
from .objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .encoded_examples import EncodedExamples


def checked_objective(objective: Any) -> Objective:
    """The objective, or the default one for None."""
    objective = Objective() if objective is None else objective
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: got {type(objective).__name__}, expected an Objective or None")
    return objective


def checked_location(intervention: Any) -> Location:
    """The location of an intervention that can be learned and has a single one."""
    if isinstance(intervention, Composite):
        raise TypeError("intervention: Composite is not supported here; pass one of its parts")
    return checked_intervention(intervention).location


def checked_intervention(intervention: Any) -> Intervention:
    """The intervention, if it can be learned from examples."""
    if not isinstance(intervention, Intervention):
        raise TypeError(f"intervention: got {type(intervention).__name__}, expected an Intervention")
    for single in intervention.singles:
        if single.needs_source:
            raise TypeError(f"intervention: a {type(single).__name__} is learned by fit_interchange")
        if isinstance(single, Projection) and not single.directions.any():
            raise ValueError(
                "intervention: a Projection whose directions are 0 has no gradient; start from one that was extracted"
            )
    return intervention


def refuse_tokenless(intervention: Intervention, data: EncodedExamples) -> None:
    """Raise a ValueError if the intervention acts on no token of the examples."""
    if not data.long_answers and all(single.location.positions == () for single in intervention.singles):
        raise ValueError(
            "intervention: it acts only on generated tokens (positions=[], generated=True), but examples have none "
            "unless an answer has several tokens, so there is nothing to learn"
        )


def refuse_idle(model: PreTrainedModel, intervention: Intervention) -> None:
    """Raise a ValueError if a norm undoes the factors of every part of the intervention."""
    offers: dict[str, None] = {}
    for single in intervention.singles:
        location = single.location
        found = layout(model, location.paths)
        idle = idle_layers(found, location.site, location.layers) if single.multiplies else []
        if len(idle) < len(location.layers):
            return
        offers[offer_of_site_after_norm(found, location.site, idle)] = None
    sites = ", ".join(sorted({repr(single.location.site) for single in intervention.singles}))
    raise ValueError(
        f"intervention: at {sites} of {type(unwrap(model)).__name__} a factor changes nothing, because a norm without "
        f"scale follows the site, so there is nothing to learn; use site='head' or a SteerVec{''.join(offers)}"
    )


def refuse_inference_mode(function: str) -> None:
    """Raise a RuntimeError where gradients cannot be enabled."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{function} needs gradients, which torch.inference_mode() rules out; call it outside")
