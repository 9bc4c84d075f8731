"""What `stress` found: figures beside the frozen model's, and a verdict for each gate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..._json import read_sealed, write_sealed
from ..._tables import Readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GateName = Literal["control", "utility", "robustness"]
GATES: tuple[GateName, ...] = ("control", "utility", "robustness")
GIVEN = "as given"
_FORMAT = 1
_MORE = ("strength", "direction", "n_examples", "left_out")
#: What a row of a kind has as its change; the others have a loss.
_CHANGES = {"perplexity": "ratio", "KL": "largest"}


@dataclass(frozen=True, slots=True)
class Check:
    """One figure against its threshold."""

    what: str
    value: float
    interval: tuple[float, float] | None  # 95 % bootstrap interval; None: it has none
    threshold: float
    at_least: bool  # whether the value must reach the threshold, or else must not exceed it

    @property
    def passed(self) -> bool:
        """Whether the value itself is on the right side."""
        return self.value >= self.threshold if self.at_least else self.value <= self.threshold

    @property
    def decided(self) -> bool:
        """Whether the whole interval is on one side of the threshold."""
        return self.interval is None or not self.interval[0] <= self.threshold <= self.interval[1]

    def __str__(self) -> str:
        ends = "" if self.interval is None else " [{:.2f}, {:.2f}]".format(*self.interval)
        wanted = f"at {'least' if self.at_least else 'most'} {self.threshold:g}"
        mark = ("" if self.passed else ", failed") + ("" if self.decided else ", not decided")
        after = ":" if "," in self.what else ""  # a mark that sets the name of a row off from the figure
        return f"{self.what}{after} {self.value:.2f}{ends} ({wanted}{mark})"


@dataclass(frozen=True, slots=True)
class Gate:
    """The verdict of one gate: it passes if all its checks do."""

    name: GateName
    checks: list[Check]

    @property
    def passed(self) -> bool | None:
        """None: nothing was measured."""
        return all(check.passed for check in self.checks) if self.checks else None

    @property
    def decided(self) -> bool:
        """Whether another sample of prompts would hardly change the verdict.

        A gate that passes needs all its checks decided, one that fails a failed check that is decided.
        """
        if self.passed:
            return all(check.decided for check in self.checks)
        return any(check.decided and not check.passed for check in self.checks)

    def __str__(self) -> str:
        if not self.checks:
            return f"{self.name}: not measured"
        verdict = ("passed" if self.passed else "FAILED") + ("" if self.decided else " (not decided)")
        return f"{self.name}: {verdict}: {'; '.join(map(str, self.checks))}"


@dataclass(frozen=True, slots=True)
class StressRow:
    """The figures of one set of prompts or texts.

    Figures of prompts: `correct` is the share with the correct answer above the wrong one under β = +strength, `wrong`
    that with the wrong one above the correct one under β = −strength, `frozen_correct` and `frozen_wrong` the same in
    the frozen model, `flipped` the mean over the directions that count, `drop` what is lost of it in comparison with
    the prompts as given, and `kl` the mean divergence of the other tokens.

    Of plain texts: `frozen`, and under the two strengths `plus` and `minus`: the perplexity, with `change` as the
    larger ratio to the frozen model's; or the divergence, with `change` as the larger one. Of unrelated behaviours and
    accuracies: the share that is right, with `change` as the larger loss. Figures of a direction that does not count
    are missing.
    """

    gate: GateName
    name: str
    kind: str
    n: int | None
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name, after the kind where it does not begin with it."""
        return self.name if not self.kind or self.name.startswith(self.kind) else f"{self.kind}: {self.name}"

    def shown(self, name: str, form: str = "{:.2f}") -> str:
        """A figure with its interval, or nothing."""
        if name not in self.figures:
            return ""
        ends = self.intervals.get(name)
        given = form.format(self.figures[name])
        return given if ends is None else f"{given} [{', '.join(map(form.format, ends))}]"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StressResult(Readable):
    """The result of `stress`."""

    rows: list[StressRow]
    gates: list[Gate]
    strength: float
    direction: str
    n_examples: int
    left_out: dict[str, str] = field(default_factory=dict)  #: what was not measured, and why

    @property
    def passed(self) -> bool:
        """Whether every gate passed; a gate that was not measured did not."""
        return all(gate.passed for gate in self.gates)

    def gate(self, name: GateName) -> Gate:
        """The gate "control", "utility" or "robustness"."""
        return self.gates[GATES.index(name)]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text; brackets are 95 % intervals."""
        shows = {"both": ("correct", "wrong"), "correct": ("correct",), "wrong": ("wrong",)}[self.direction]
        rows = []
        for row in self.rows:
            cells = [row.gate, row.label, "" if row.n is None else str(row.n)]
            if row.gate == "control":
                frozen = ", ".join(f"{row.figures[f'frozen_{name}']:.2f}" for name in shows)
                both = [row.shown(name) if name in shows else "" for name in ("correct", "wrong")]
                change = "" if row.name == GIVEN else f"drop {row.shown('drop')}"
                rows.append([*cells, frozen, *both, change, row.shown("kl")])
            else:
                both = [row.shown(name) for name in ("frozen", "plus", "minus")]
                rows.append([*cells, *both, f"{_CHANGES.get(row.kind, 'loss')} {row.shown('change')}", ""])
        s = f"{self.strength:g}"
        return ["gate", "on", "n", "frozen", f"β = +{s}", f"β = −{s}", "change", "KL"], rows

    def _heading(self) -> str:
        verdict = "passed every gate" if self.passed else "did not pass every gate"
        return f"Stress test at strength {self.strength:g} on {self.n_examples} prompts: {verdict}"

    def _notes(self) -> list[str]:
        told = {
            "both": "correct above wrong under β = +, wrong above correct under β = −",
            "correct": "correct above wrong under β = +",
            "wrong": "wrong above correct under β = −",
        }[self.direction]
        notes = [f"control: shares of prompts, {told}", *map(str, self.gates)]
        return notes + [f"left out: {name} ({reason})" for name, reason in self.left_out.items()]

    def plot(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Figure:
        """Draw the flips under each perturbation and the drops, beside the frozen model; see `plots.comparison`."""
        from ...plots import Measured, comparison

        shows = {"both": ("correct", "wrong"), "correct": ("correct",), "wrong": ("wrong",)}[self.direction]
        labels = {"correct": "correct above wrong, β = +", "wrong": "wrong above correct, β = −"}
        drawn = []
        for row in self.rows:
            if row.gate == "control":
                for name in shows:
                    drawn.append(
                        Measured(
                            row.name, labels[name], (row.figures[name],), baseline=row.figures[f"frozen_{name}"],
                            interval=row.intervals.get(name),
                        )
                    )  # fmt: skip
                drawn.append(
                    Measured(row.name, "KL of the other tokens", (row.figures["kl"],), interval=row.intervals.get("kl"))
                )
        title = options.pop("title", f"Stress test at strength {self.strength:g}")
        return comparison(drawn, path, title=title, **options)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON, with `passed` and `decided` of each gate beside its checks."""
        rows = [
            asdict(row) | {"intervals": {name: list(ends) for name, ends in row.intervals.items()}} for row in self.rows
        ]
        gates = [
            {
                "name": gate.name,
                "checks": [
                    asdict(check) | {"interval": None if check.interval is None else list(check.interval)}
                    for check in gate.checks
                ],
                "passed": gate.passed,
                "decided": gate.decided,
            }
            for gate in self.gates
        ]
        more = {name: getattr(self, name) for name in _MORE}
        return {"format": _FORMAT, "passed": self.passed, **more, "gates": gates, "rows": rows}

    @classmethod
    def from_dict(cls, data: Any) -> StressResult:
        """The inverse of `to_dict`.

        Raises:
            ValueError: not such data.
        """
        try:
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']!r}, this version reads {_FORMAT}")
            rows = [StressRow(**row | {"intervals": _ends(row["intervals"])}) for row in data["rows"]]
            gates = [
                Gate(
                    gate["name"],
                    [
                        Check(
                            **check
                            | {"what": str(check["what"]).removesuffix(","), "interval": _pair(check["interval"])}
                        )
                        for check in gate["checks"]
                    ],
                )
                for gate in data["gates"]
            ]
            more = {name: data[name] for name in _MORE}
            return cls(rows, gates, **more)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"damaged, or not a stress test ({type(error).__name__}: {error})") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to a JSON file, atomically."""
        write_sealed(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StressResult:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it was changed, or is something else; the message names the file.
        """
        try:
            return cls.from_dict(read_sealed(Path(path), finite=False))  # a perplexity may be infinite
        except ValueError as error:
            text = str(error)
            raise ValueError(text if str(path) in text else f"{path}: {text}") from None


def _ends(intervals: dict[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    return {name: (low, high) for name, (low, high) in intervals.items()}


def _pair(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return None if interval is None else (interval[0], interval[1])
