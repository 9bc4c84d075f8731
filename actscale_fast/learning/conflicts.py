"""Evaluation on knowledge conflicts, each kind apart: the parametric answer against the contextual one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .._json import write_json
from .._tables import Readable
from ..interventions import Intervention
from ..tasks.knowledge_conflicts import CONFLICT_KINDS
from ..tasks.known_prompts import conflict_kind
from ..tasks.loading import ExampleSource, examples_from
from .evaluate import Evaluation, evaluation_of, measure_all
from .prompt_statistics import Measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The figures of a table, and what it calls them: the correct answer is the parametric one.
_SHOWN = {
    "flip_to_correct": "parametric above, β = +1",
    "flip_to_wrong": "contextual above, β = −1",
    "top_correct": "parametric on top, β = +1",
    "top_wrong": "contextual on top, β = −1",
    "kl_correct": "KL, β = +1",
    "kl_wrong": "KL, β = −1",
}


@dataclass(frozen=True, slots=True, repr=False)
class ConflictEvaluation(Readable):
    """The result of `evaluate_conflicts`."""

    kinds: dict[str, Evaluation] = field(repr=False)  #: by kind of conflict, in the order of the protocol
    mean: Evaluation = field(repr=False)  #: on all examples together

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text: a column per kind, frozen → steered with 95 % intervals over its prompts.

        A clean prompt has no context, and so no contextual answer to prefer.
        """
        rows = [["prompts", *(str(one.n_examples) for one in self.kinds.values())]]
        for name, label in _SHOWN.items():
            cells = []
            for kind, one in self.kinds.items():
                without = kind == "clean" and name.endswith("wrong")
                cells.append("–" if without else _before_and_after(one, name))
            rows.append([label, *cells])
        return ["", *self.kinds], rows

    def _heading(self) -> str:
        return f"Knowledge conflicts, {self.mean.n_examples} prompts"

    def _notes(self) -> list[str]:
        return ["parametric: the correct answer; above: above the other one; on top: the most likely of all tokens"]

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {"kinds": {kind: one.to_dict() for kind, one in self.kinds.items()}, "mean": self.mean.to_dict()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a JSON file, atomically."""
        write_json(path, self.to_dict())


def evaluate_conflicts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSource,
    intervention: Intervention,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> ConflictEvaluation:
    """`evaluate` on each kind of knowledge conflict: clean, substituted and coherent, as JuICE's protocol reports them.

    The parametric answer is the examples' correct one, which β = +1 should bring up on every kind; the contextual one
    is the wrong one, which β = −1 should bring up where there is a context. In arXiv 2503.10996 each direction has
    heads and strengths of its own; that one intervention serves both is our reading.

    Args:
        model, tokenizer, intervention, batch_size, progress: as in `evaluate`.
        examples: held-out examples of `tasks.knowledge_conflicts`.

    Raises:
        TypeError, ValueError: as `evaluate`; or an example that is no knowledge conflict of that task.

    Example:
        >>> train, test = af.tasks.knowledge_conflicts(tokenizer)
        >>> print(af.evaluate_conflicts(model, tokenizer, test, scalars))
    """
    given = examples_from(examples)
    rows: dict[str, list[int]] = {kind: [] for kind in CONFLICT_KINDS}
    for row, example in enumerate(given):
        kind = conflict_kind(example)
        if kind is None:
            raise ValueError(
                f"{example.where}: got a prompt that is no knowledge conflict of tasks.knowledge_conflicts"
            )
        rows[kind].append(row)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    ((steered, frozen),) = measure_all(model, tokenizer, given, [intervention], **options)

    def of(some: list[int]) -> Evaluation:
        return evaluation_of(intervention, *(Measured(*(values[some] for values in one)) for one in (steered, frozen)))

    kinds = {kind: of(some) for kind, some in rows.items() if some}
    return ConflictEvaluation(kinds, of(list(range(len(given)))))


def _before_and_after(one: Evaluation, name: str) -> str:
    ends = one.intervals.get(name)
    before = "" if one.baseline is None or name.startswith("kl") else f"{getattr(one.baseline, name):.2f} → "
    return f"{before}{getattr(one, name):.2f}" + ("" if ends is None else " [{:.2f}, {:.2f}]".format(*ends))
