"""A fit that cannot move says so: its gradient is 0 for every parameter, and the likely causes are named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..architectures.layout import layout
from ..interventions import Intervention
from .objective import Objective

if TYPE_CHECKING:
    from .encoded_examples import EncodedExamples
    from .fit_state import FitState


class ZeroGradientError(ValueError):
    """Nothing can be learned: no parameter has a gradient."""


class ZeroGradientWatch:
    """Looks at the first gradients of a fit, until one of them is not 0.

    The first step raises where the gradient is exactly 0 although answers are not yet apart by the margin. Where all of
    them are, a gradient of 0 is right, so the watch waits until every example was seen.

    Args:
        model, data: the model and the examples of the fit.
        state: the fit.
    """

    def __init__(self, model: nn.Module, data: EncodedExamples, state: FitState) -> None:
        self.model, self.data, self.state = model, data, state
        self.unseen = set(state.examples)
        self.watching = state.taken == 0

    def look(self, rows: Sequence[int], terms: Tensor, gradients: Sequence[Tensor]) -> None:
        """Look at the terms (the first is E) and the gradients of a step on these rows, before the update.

        Raises:
            ZeroGradientError: the parameters would never move.
        """
        if not self.watching:
            return
        effectiveness = float(terms[0])
        at_rest = not any(bool(value.detach().any()) for value in self.state.values)
        if effectiveness == 0 and at_rest:
            for gradient in gradients:  # that of the KL is 0 here, up to rounding that Adam would turn into whole steps
                gradient.zero_()
            self.unseen -= set(rows)
            if not self.unseen:
                raise self._error(_satisfied(self.state.objective))
            return
        is_zero = not any(bool(gradient.any()) for gradient in gradients)  # NaN is not 0
        if is_zero and effectiveness > 0:
            raise self._error(_unreachable(self.model, self.data, self.state.intervention, self.state.examples))
        self.watching = False

    def _error(self, message: str) -> ZeroGradientError:
        return ZeroGradientError(f"{self.state.name}: {message}" if self.state.name else message)


def refuse_zero(
    model: nn.Module, data: EncodedExamples, intervention: Intervention, objective: Objective, rows: Sequence[int],
    effectiveness: float,
) -> None:  # fmt: skip
    """Raise a ZeroGradientError for a gradient of 0 on all these rows at α = 0, where E is `effectiveness`."""
    if effectiveness == 0:
        raise ZeroGradientError(_satisfied(objective))
    raise ZeroGradientError(_unreachable(model, data, intervention, rows))


def _unreachable(model: nn.Module, data: EncodedExamples, intervention: Intervention, rows: Sequence[int]) -> str:
    """The message of the error: what is known to be the cause, or else what usually is."""
    n = sum(value.numel() for value in intervention.parameters())
    what = f"the gradient is exactly 0 for all {n} parameters at the first step, so the fit cannot move"
    lengths = [len(data.prompts[row]) for row in rows]
    last = layout(model, intervention.paths).n_layers - 1
    in_answers = any(row in data.long_answers for row in rows)  # their tokens are steered as generated ones
    causes = [
        "" if in_answers and part.location.generated else _cause(factor, part, lengths, last)
        for factor, part in intervention.pairs
    ]
    known = dict.fromkeys(cause for cause in causes if cause)
    if known and all(causes):
        return f"intervention: {what}: {'; '.join(known)}"
    likely = [
        "what it changes does not reach the answers, for example because another patch or a head mask removes it",
        "the module at its site returns 0",
    ]
    if data.model is not None and next(data.model.parameters()).dtype == torch.float16:
        likely.append("the gradient is too small for float16 (load the model in float32 or bfloat16)")
    return f"intervention: {what}; the likely causes are: {'; '.join([*known, *likely])}"


def _cause(factor: float, part: Intervention, lengths: Sequence[int], last: int) -> str:
    """Why one part cannot have a gradient; "" if that is not known."""
    if factor == 0:
        return "its factor is 0"
    positions, layers = part.location.positions, part.location.layers
    if positions is None:
        return ""
    inside = [[p for p in positions if -length <= p < length] for length in lengths]
    if not any(inside):
        return (
            f"positions: got {list(positions)}, but no prompt has such a token (the longest prompt has {max(lengths)} "
            "tokens, counted from 0, or from −1 at its end)"
        )
    ends = any(p in (-1, length - 1) for length, own in zip(lengths, inside, strict=True) for p in own)
    if set(layers) == {last} and not ends:
        return (
            f"layers: got {list(layers)}, the last layer, where only the prompt's last token (position −1) reaches the "
            f"answers, but positions={list(positions)} leaves it out"
        )
    return ""


def _satisfied(objective: Objective) -> str:
    directions = " and ".join(f"{sign:+d}" for sign in objective.directions)
    return (
        f"examples: every prompt already has the answers apart by the margin of {objective.margin:g} under β = "
        f"{directions}, so there is nothing to learn; raise the margin, or use examples that the model gets wrong"
    )
