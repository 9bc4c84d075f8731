"""Stress tests of what was learned per head, at the strength that it was learned with."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..learning import stress
from ..learning.stress.result import Gate
from .laboratory import Laboratory
from .systems import system_named
from .task_forms import Task


def stressed(lab: Laboratory, task: Task, name: str) -> dict[str, Any]:
    """The gates of one system of the first seed, on its test prompts."""
    seed = lab.size.seeds[0]
    test = task.examples(lab.tokenizer, lab.size, seed).test[: lab.size.n_stressed]
    learned = lab.learned(task, system_named(name), seed)
    try:
        result = stress(lab.model, lab.tokenizer, learned, test, seed=seed)
    except ValueError as error:  # such as changed prompts that are longer than the model's context
        return {"gates": [], "n_examples": len(test), "left_out": {"the whole test": str(error)}}
    gates = [gate_record(gate) for gate in result.gates]
    return {"gates": gates, "n_examples": result.n_examples, "left_out": result.left_out}


def gate_record(gate: Gate) -> dict[str, Any]:
    """A gate and its checks with their verdicts, as JSON."""
    checks = [asdict(one) | {"passed": one.passed, "decided": one.decided} for one in gate.checks]
    return {"gate": gate.name, "passed": gate.passed, "decided": gate.decided, "checks": checks}
