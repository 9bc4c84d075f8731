"""The results of a sweep: its fits, their scores, their Pareto front and their table."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self, get_args

from ..._suggestions import did_you_mean
from ..._tables import Readable
from ...interventions import Intervention
from ...plots.fronts import Score
from ..evaluate import Evaluation
from .grid import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(slots=True)
class SweepFit:
    """One fit of a sweep."""

    label: str
    chosen: dict[str, Any]  # what the grid says about it
    task: str | None
    settings: dict[str, Any]  # of the fit, including the objective's fields
    intervention: Intervention = field(repr=False)
    history: list[dict[str, float]] = field(repr=False)
    folder: str  # the name of its folder in the sweep's folder
    evaluation: Evaluation | None = field(default=None, repr=False)
    error: str | None = None  # why it stopped early

    @classmethod
    def of(
        cls, point: Point, intervention: Intervention, history: list[dict[str, float]], error: str | None = None
    ) -> Self:
        objective = asdict(point.objective) | {"directions": list(point.objective.directions)}
        settings = point.settings.to_dict() | objective
        chosen = jsonable(point.chosen)
        return cls(point.label, chosen, point.task, settings, intervention, history, point.folder, error=error)

    @property
    def n_active(self) -> int:
        """Scalars that are not exactly zero."""
        return self.intervention.n_active

    def score(self, by: Score) -> float:
        """How effective the fit is, larger is better.

        Args:
            by: "flips": the mean of both flip rates on the held-out examples; "effectiveness": −E on the training batch
                of the last step, in logits.

        Raises:
            ValueError: an unknown score, or "flips" for a fit that was not evaluated.
        """
        if by not in get_args(Score):
            raise ValueError(
                f"by: got {by!r}, expected one of {', '.join(get_args(Score))}{did_you_mean(by, get_args(Score))}"
            )
        if by == "effectiveness":
            return -self.history[-1]["effectiveness"]
        if self.evaluation is None:
            raise ValueError(f"by: got 'flips', but {self.label} was not evaluated; sweep(..., evaluate_on=…)")
        return (self.evaluation.flip_to_correct + self.evaluation.flip_to_wrong) / 2

    def to_dict(self) -> dict[str, Any]:
        """The summary of the fit, for JSON."""
        last = self.history[-1] if self.history else {}
        return {
            "label": self.label,
            "chosen": self.chosen,
            "task": self.task,
            "settings": self.settings,
            "folder": self.folder,
            "steps": len(self.history),
            "n_active": self.n_active,
            "n_scalars": self.intervention.n_parameters,
            "l1": self.intervention.l1,
            "last": last,
            "error": self.error,
            "evaluation": None if self.evaluation is None else self.evaluation.to_dict(),
        }


@dataclass(slots=True, repr=False)
class SweepResult(Readable):
    """The fits of a sweep, in the grid's order."""

    fits: list[SweepFit]
    #: Duration of this call; fits that were already finished take no time.
    seconds: float

    @property
    def best_score(self) -> Score:
        """The default score of `pareto` and the plot: "flips" if all fits were evaluated, else "effectiveness"."""
        return "flips" if all(fit.evaluation is not None for fit in self._whole()) else "effectiveness"

    def pareto(self, by: Score | None = None) -> list[SweepFit]:
        """The fits that no other fit beats in both respects, sorted by the number of active scalars.

        Args:
            by: the score set against the number of active scalars (see `SweepFit.score`); default `best_score`.
        """
        score = by or self.best_score
        front: list[SweepFit] = []
        for fit in sorted(self._whole(), key=lambda fit: (fit.n_active, -fit.score(score))):
            if not front or fit.score(score) > front[-1].score(score):
                front.append(fit)
        return front

    def plot(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Figure:
        """Draw the fits and the front; see `plots.pareto`."""
        from ... import plots

        return plots.pareto(self, path, **options)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, one row per fit) as text."""
        evaluated = any(fit.evaluation is not None for fit in self.fits)
        columns = ["fit", "steps", "E", "F", "active", "ℓ1"]
        columns += ["correct above wrong", "wrong above correct", "KL"] if evaluated else []
        rows = []
        for fit in self.fits:
            last, found = fit.history[-1] if fit.history else {}, fit.evaluation
            row = [fit.label, str(len(fit.history))]
            row += [f"{last[name]:.2f}" if last else "" for name in ("effectiveness", "faithfulness")]
            row += [str(fit.n_active), f"{fit.intervention.l1:.2f}"]
            if evaluated:
                values = (found.flip_to_correct, found.flip_to_wrong, found.kl) if found else ()
                row += [f"{value:.2f}" for value in values] or ["", "", ""]
            rows.append(row if fit.error is None else [*row[:2], fit.error, *[""] * (len(columns) - 3)])
        return columns, rows

    def _heading(self) -> str:
        return f"Sweep of {len(self.fits)} fits in {self.seconds:.1f} s"

    def _notes(self) -> list[str]:
        front = [fit.label for fit in self.pareto()]
        return [f"On the Pareto front: {'; '.join(front)}"] if front else []

    def _whole(self) -> list[SweepFit]:
        return [fit for fit in self.fits if fit.error is None and fit.history]


def jsonable(value: Any) -> Any:
    """`value` with ranges and tuples as lists."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [jsonable(item) for item in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)
