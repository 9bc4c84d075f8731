"""How few scalars suffice, and where they are: the path of the ℓ1 weight, and knock-outs."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..interventions import ActivScalar
from ..learning import Objective, attribution, minimality_path, sweep
from .laboratory import Laboratory
from .measuring import measure
from .systems import System
from .task_forms import Task

_TOP = 20  # number of heads that count as "the largest"; at most a quarter of all, and no scalar that is 0


def path(lab: Laboratory, task: Task, system: System) -> list[dict[str, Any]]:
    """Held-out records along decreasing weights of the ℓ1 norm, each fit warm-started from the one before."""
    size, tokenizer, settings, seed = lab.size, lab.tokenizer, lab.settings(task, system), lab.size.seeds[0]
    splits = task.examples(tokenizer, size, seed)
    objective = Objective(faithfulness=settings["faithfulness"])
    some = splits.train[:64]
    first = minimality_path(lab.model, tokenizer, some, 1, objective=objective, batch_size=len(some))[0]
    last = min(settings["minimality"], first) / 2
    weights = [first * (last / first) ** ((index + 1) / size.n_path) for index in range(size.n_path)]
    result = sweep(
        lab.model, tokenizer, splits.train, {"minimality": weights}, objective=objective, steps=size.path_steps,
        lr=settings["lr"], batch_size=size.batch_size, seed=seed, warm_start=True,
        folder=lab.folder / "work" / f"{task.name}-path", progress=False,
    )  # fmt: skip
    records = measure(lab.model, tokenizer, splits.test, [fit.intervention for fit in result.fits])
    return [
        record | {"minimality": fit.settings["minimality"]} for record, fit in zip(records, result.fits, strict=True)
    ]


def knock_out(lab: Laboratory, task: Task, system: System) -> dict[str, Any]:
    """Remove one head at a time, and compare with the gradient's prediction and the learned scalars."""
    seed = lab.size.seeds[0]
    train = task.examples(lab.tokenizer, lab.size, seed).train
    found = attribution(lab.model, lab.tokenizer, train[: lab.size.n_attributed], progress=False)
    assert found.knock_out is not None
    assert found.agreement is not None
    learned = lab.learned(task, system, seed)
    assert isinstance(learned, ActivScalar)
    n_top = max(min(_TOP, learned.alpha.numel() // 4, learned.n_active), 1)
    largest = set(learned.alpha.detach().abs().flatten().topk(n_top).indices.tolist())
    measured = set(found.knock_out.abs().flatten().topk(n_top).indices.tolist())
    active = learned.alpha.detach().flatten() != 0
    return {
        "n_examples": found.n_examples,
        "agreement": {name: _defined(value) for name, value in found.agreement._asdict().items()},
        "n_top": n_top,
        "shared_with_scalars": len(largest & measured),
        "expected_by_chance": n_top * n_top / learned.alpha.numel(),
        # Amplifies a head that speaks for the correct answer, whose removal lowers the logit difference.
        "same_sign": _share_of_same_sign(learned.alpha.detach().flatten()[active], found.knock_out.flatten()[active]),
        "measured": _rounded(found.knock_out[:, 0]),
        "predicted": _rounded(-found.scores[:, 0]),
    }


def _rounded(values: torch.Tensor) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in values.tolist()]


def _share_of_same_sign(scalars: torch.Tensor, change: torch.Tensor) -> float | None:
    return _defined(float((scalars.sign() == -change.sign()).float().mean()))


def _defined(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
