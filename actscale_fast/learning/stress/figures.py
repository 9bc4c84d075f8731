"""From what was measured to rows and checks, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...interventions import Intervention
from ..bootstrap import intervals
from ..prompt_statistics import Measured
from .plain_text import log_perplexities, next_token_divergences
from .result import Check, StressRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Ends = tuple[float, float]


def flipped(found: Measured, signs: Sequence[int]) -> Tensor:
    """The share of the directions that flip each prompt, [N]."""
    shares = {1: found.plus > 0, -1: found.minus < 0}
    return torch.stack([shares[sign].double() for sign in signs]).mean(0)


def flipped_before(found: Measured, signs: Sequence[int]) -> Tensor:
    """The same in the frozen model, which has one answer for both directions."""
    shares = {1: found.start > 0, -1: found.start < 0}
    return torch.stack([shares[sign].double() for sign in signs]).mean(0)


def control_rows(kinds: Mapping[str, str], measured: Mapping[str, Measured], signs: Sequence[int]) -> list[StressRow]:
    """One row per set of prompts; the first set is that of the prompts as given.

    Args:
        kinds: the kind of each set, by name.
        measured: what was measured on each set, of the same prompts in the same order.
        signs: of β, for the directions that count.
    """
    as_given = flipped(next(iter(measured.values())), signs)
    rows = []
    for name, found in measured.items():
        share = flipped(found, signs)
        divergence = torch.stack([{1: found.kl_correct, -1: found.kl_wrong}[sign] for sign in signs]).mean(0)
        columns = {
            "frozen_correct": (found.start > 0).double(),
            "frozen_wrong": (found.start < 0).double(),
            "correct": (found.plus > 0).double(),
            "wrong": (found.minus < 0).double(),
            "flipped": share,
            "drop": as_given - share,
            "kl": divergence,
        }
        rows.append(_row("control", name, kinds[name], columns))
    return rows


def overall(measured: Mapping[str, Measured], signs: Sequence[int]) -> dict[str, tuple[float, Ends]]:
    """The mean over all sets of prompts of the share flipped, and of its gain over the frozen model."""
    shares = torch.stack([flipped(found, signs) for found in measured.values()]).mean(0)
    before = torch.stack([flipped_before(found, signs) for found in measured.values()]).mean(0)
    columns = {"flipped": shares, "gain": shares - before}
    ends = intervals(columns, {})
    return {name: (float(values.mean()), ends[name]) for name, values in columns.items()}


def behaviour_row(name: str, found: Measured, signs: Sequence[int]) -> StressRow:
    """How often an unrelated behaviour has its correct answer above the wrong one, under each strength."""
    right = {1: found.plus > 0, -1: found.minus > 0}
    columns = {"frozen": (found.start > 0).double()}
    columns |= {_UNDER[sign]: right[sign].double() for sign in signs}
    changes = [columns["frozen"] - columns[_UNDER[sign]] for sign in signs]
    return _row("robustness", name, "unrelated", columns, changes)


def text_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, intervention: Intervention, texts: Sequence[str],
    prompts: Sequence[str], strength: float, signs: Sequence[int], batch_size: int,
) -> list[StressRow]:  # fmt: skip
    """The perplexity of plain texts, and the divergence after unrelated prompts; neither without any."""
    strengths, rows = [sign * strength for sign in signs], []
    if texts:
        logs = log_perplexities(model, tokenizer, intervention, texts, strengths, batch_size)
        names = ["frozen", *(_UNDER[sign] for sign in signs)]
        columns = dict(zip(names, logs, strict=True))
        row = _row("utility", "plain texts", "perplexity", columns, list(logs[1:] - logs[0]))
        rows.append(
            StressRow(
                row.gate, row.name, row.kind, row.n, {name: _exp(value) for name, value in row.figures.items()},
                {name: (_exp(low), _exp(high)) for name, (low, high) in row.intervals.items()},
            )
        )  # fmt: skip
    if prompts:
        kl = next_token_divergences(model, tokenizer, intervention, prompts, strengths, batch_size)
        columns = {_UNDER[sign]: values for sign, values in zip(signs, kl, strict=True)}
        rows.append(_row("utility", "unrelated prompts", "KL", columns, list(kl)))
    return rows


def check(row: StressRow, threshold: float) -> Check:
    """The change of a row against the most that is allowed."""
    what = {"perplexity": "perplexity ratio", "KL": "KL", "accuracy": f"loss of accuracy on {row.name}"}[row.kind]
    return Check(what, row.figures["change"], row.intervals.get("change"), threshold, False)


def worst(what: str, rows: Sequence[StressRow], figure: str, threshold: float) -> list[Check]:
    """The largest value of a figure, with the name of its row, against the most that is allowed; none without rows."""
    if not rows:
        return []
    row = max(rows, key=lambda one: one.figures[figure])
    known = [one.intervals[figure] for one in rows if figure in one.intervals]
    return [Check(f"{what}, {row.name}", row.figures[figure], _of_the_largest(known), threshold, False)]


#: What a row calls the figure under each sign of β.
_UNDER = {1: "plus", -1: "minus"}


def _row(
    gate: str, name: str, kind: str, columns: dict[str, Tensor], changes: Sequence[Tensor] = ()
) -> StressRow:  # fmt: skip
    """A row of the means of columns [N], and as its change the largest mean of some others, if there are any."""
    n = len(next(iter(columns.values())))
    figures = {name: float(values.mean()) for name, values in columns.items()}
    ends = intervals(columns, {})
    if changes:
        figures["change"] = max(float(values.mean()) for values in changes)
        found = intervals({str(number): values for number, values in enumerate(changes)}, {})
        largest = _of_the_largest(list(found.values()))
        ends |= {} if largest is None else {"change": largest}
    return StressRow(gate, name, kind, n, figures, ends)  # type: ignore[arg-type]


def _of_the_largest(known: Sequence[Ends]) -> Ends | None:
    """An interval of the largest of several figures, from the intervals of each: the largest lower and upper end.

    It is below a threshold only if all intervals are, and above it if one is. That of the figure which happens to be
    largest would leave out that another may be larger for other prompts.
    """
    return (max(low for low, _ in known), max(high for _, high in known)) if known else None


def _exp(value: float) -> float:
    """exp, infinite where no float can hold it."""
    return math.exp(value) if value < 700 else math.inf
