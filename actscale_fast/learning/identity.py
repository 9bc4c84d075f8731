"""What identifies a fit, so that a checkpoint or a sweep's folder is never continued by another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..architectures.weights_digest import weights_digest
from ..interventions import Composite, Intervention
from ..tasks.examples import example_fields
from .checkpoint import digest
from .distributed import SINGLE_PROCESS, ProcessGroup
from .encoded_examples import EncodedExamples
from .objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fit_identity(intervention: Intervention, objective: Objective) -> dict[str, Any]:
    """What identifies a fit beside its settings, examples and model, for JSON."""
    places = [single.location.to_dict() for single in intervention.singles]
    return {
        "objective": asdict(objective) | {"directions": list(objective.directions)},
        "intervention": type(intervention).__name__,
        "location": [list(intervention.factors), places] if isinstance(intervention, Composite) else places[0],
    }


def examples_identity(data: EncodedExamples, rows: Sequence[int]) -> dict[str, Any]:
    """Digests of some examples and of their token ids."""
    correct, wrong = data.correct.tolist(), data.wrong.tolist()
    tokens: list[Any] = [
        [data.prompts[row] for row in rows], [correct[row] for row in rows], [wrong[row] for row in rows]
    ]  # fmt: skip
    long = [data.long_answers[row] for row in rows if row in data.long_answers]
    if long:
        tokens.append([[[*answers.correct], [*answers.wrong]] for answers in long])
    return {
        "examples": digest([example_fields(data.examples[row]) for row in rows]),
        "tokens": digest(tokens),
    }


def model_identity(model: PreTrainedModel, saved: bool, processes: ProcessGroup = SINGLE_PROCESS) -> dict[str, Any]:
    """A digest of the model's weights.

    Args:
        model: the model as the caller passed it.
        saved: whether something is saved that must belong to this model. A weight that cannot be read is then a
            ValueError.
        processes: if there are several, they compare their models where that is possible.
    """
    if not saved and processes.n_processes == 1:
        return {}
    try:
        return {"model": weights_digest(model, collective=True)}
    except ValueError:
        if saved:
            raise
        return {}
