"""How few scalars suffice, and where they are: the path, knock-outs, overlap between seeds and tasks."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..interventions import ActivScalar
from ..learning import attribution, minimality_path, sweep
from .comparing import Laboratory
from .measuring import figures
from .systems import System, Task

_TOP = 20  # number of heads that count as "the largest"; at most a quarter of all, and no scalar that is 0


def path(lab: Laboratory, task: Task, system: System) -> list[dict[str, Any]]:
    """Held-out figures along decreasing weights of the ℓ1 norm, each fit warm-started from the one before."""
    size, tokenizer = lab.size, lab.tokenizer
    train, test = task.examples(tokenizer, size, size.seeds[0], aligned=system.aligned)
    template = ActivScalar.for_model(lab.model)
    # The first weights of the path keep nearly all scalars at 0; the last is half of that in the comparison.
    some = train[: size.n_test]
    first = minimality_path(lab.model, tokenizer, some, 1, objective=system.objective, batch_size=len(some))[0]
    last = min(system.objective.minimality_weight, first) / 2
    weights = [first * (last / first) ** ((index + 1) / size.n_path) for index in range(size.n_path)]
    result = sweep(
        lab.model, tokenizer, train, {"minimality": weights}, intervention=template, objective=system.objective,
        steps=size.path_steps, lr=system.lr, seed=size.seeds[0], warm_start=True, evaluate_on=test,
        folder=lab.folder / "work" / f"{task.name}-path", progress=False,
    )  # fmt: skip
    rows = []
    for fit in result.fits:
        assert fit.evaluation is not None
        rows.append(figures(fit.evaluation, fit.intervention) | {"minimality": fit.settings["minimality"]})
    return rows


def knock_out(lab: Laboratory, task: Task, system: System) -> dict[str, Any]:
    """Remove one head at a time, and compare with the gradient's prediction and the learned scalars."""
    seed = lab.size.seeds[0]
    train, _ = task.examples(lab.tokenizer, lab.size, seed, aligned=system.aligned)
    found = attribution(lab.model, lab.tokenizer, train[: lab.size.n_attributed], progress=False)
    found.heatmap(lab.folder / f"{task.name}-knock-out.png", title=f"{task.title}: removing one head at a time")
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
    }


def _share_of_same_sign(scalars: torch.Tensor, change: torch.Tensor) -> float | None:
    return _defined(float((scalars.sign() == -change.sign()).float().mean()))


def _defined(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
