"""What a report shows of the stress tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .blocks import Cell, Column, Table
from .intervals import Interval
from .laboratory import Laboratory
from .systems import system_named
from .task_forms import Task


def stress_table(lab: Laboratory, task: Task) -> Table:
    """The verdict of each gate of the stress tests, and below it those of its checks, with their thresholds."""
    rows: list[list[Cell]] = []
    for name, found in lab.results["stress"][task.name].items():
        title = system_named(name).title
        for gate in found["gates"]:
            rows.append([title, gate["gate"], "the gate", None, "", f"**{_passed(gate)}**"])
            for check in gate["checks"]:
                measured = Interval(check["value"], *(check["interval"] or (check["value"],) * 2))
                bound = f"at {'least' if check['at_least'] else 'most'} {check['threshold']:g}"
                rows.append([title, gate["gate"], check["what"], measured, bound, _passed(check)])
    columns = [
        Column("system"), Column("gate"), Column("measured"), Column("value"), Column("threshold"), Column("verdict"),
    ]  # fmt: skip
    return Table(f"{task.name}-stress", columns, rows)


def _passed(found: Mapping[str, Any]) -> str:
    """The verdict of a gate or a check, by the rules of `stress`."""
    if found["passed"] is None:
        return "not measured"
    return ("passed" if found["passed"] else "failed") + ("" if found["decided"] else ", not decided")


def left_out(lab: Laboratory, task: Task) -> list[str]:
    """A sentence for each part that the stress tests left out, once for all systems with the same reason."""
    systems: dict[tuple[str, str], list[str]] = {}
    for system, found in lab.results["stress"][task.name].items():
        for part, reason in found["left_out"].items():
            systems.setdefault((part, " ".join(reason.split())), []).append(system_named(system).title)
    return [f"Left out for {'; '.join(titles)}: {part}, {reason}." for (part, reason), titles in systems.items()]
