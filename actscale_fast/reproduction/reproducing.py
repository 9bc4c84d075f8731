"""The whole run: stages whose results are files, and the report at the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..architectures.layout import layout
from ..architectures.weights_digest import weights_digest
from ..learning.checkpoint import digest
from ..modules.evaluation_mode import evaluation_mode
from . import locating, recipes, transferring
from .comparing import Laboratory
from .pictures import draw, transferred
from .report import write_report
from .stages import Stages
from .systems import FULL, QUICK, SYSTEMS, TASKS, Size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def reproduce(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    *,
    quick: bool = False,
    size: Size | None = None,
    progress: bool = True,
) -> Path:
    """Run every system on every task and write a report, `report.md`, with pictures.

    Finished stages and checkpoints of fits are files in the folder, so the same call continues a run that was killed.
    The report judges the claims of the abstract of arXiv 2410.04962 by criteria that it states.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer; the model is left unchanged.
        folder: output folder.
        quick: use one seed and smaller counts; the report says so.
        size: your own counts instead (`actscale_fast.reproduction.Size`).
        progress: show a progress bar.

    Returns:
        The path of the report.

    Raises:
        ValueError: the folder holds a run with another model or size, or the tokenizer lacks the words of a task.
    """
    from tqdm.auto import tqdm

    if quick and size is not None:
        raise ValueError("size: given together with quick=True, expected one or the other")
    chosen = size or (QUICK if quick else FULL)
    found = layout(model)
    settings = {
        "version": __version__,
        "model": found.model_type,
        "weights": weights_digest(model),
        "dtype": str(next(model.parameters()).dtype),
        "systems": digest([repr(system) for system in SYSTEMS]),
        **chosen.to_dict(),
    }
    lab = Laboratory(model, tokenizer, chosen, Path(folder))
    for task in TASKS:  # fails early if the tokenizer lacks the words
        for aligned in (False, True):
            task.examples(tokenizer, chosen, chosen.seeds[0], aligned=aligned)
    stages = Stages(lab.folder, settings)
    plan = _plan(lab)
    results: dict[str, Any] = {}
    with tqdm(total=len(plan), desc="reproduce", disable=not progress, unit="stage", dynamic_ncols=True) as bar:
        for where, compute in plan:
            bar.set_postfix_str(" ".join(where))
            with evaluation_mode(model):
                result = stages.run("-".join(where), compute)
            _put(results, where, result)
            bar.update()
    draw(lab, results)
    return write_report(lab, results, quick=chosen is QUICK, seconds=stages.seconds)


Stage = tuple[tuple[str, ...], Callable[[], Any]]


def _plan(lab: Laboratory) -> list[Stage]:
    """Every stage, (place in the results, function), in the order of their dependencies."""
    plan: list[Stage] = []
    scalars = SYSTEMS[0]
    for seed in lab.size.seeds:
        for task in TASKS:
            for system in SYSTEMS:
                where = ("comparison", task.name, system.name, str(seed))
                plan.append((where, partial(lab.compare, task, system, seed)))
            plan.append((("baselines", task.name, str(seed)), partial(lab.baselines, task, scalars, seed)))
    for task in TASKS:
        plan += [
            (("knock-out", task.name), partial(locating.knock_out, lab, task, scalars)),
            (("path", task.name), partial(locating.path, lab, task, scalars)),
            (("transfer", task.name), partial(transferring.transfer, lab, task, transferred())),
        ]
    for name in ("act-add", "mean-centring", "instruction", "latent"):
        recipe = getattr(recipes, name.replace("-", "_"))
        plan.append((("recipes", name), partial(recipes.attempted, recipe, lab)))
    return plan


def _put(results: dict[str, Any], where: tuple[str, ...], result: Any) -> None:
    """Store a result at its place; the results of several seeds form a list."""
    of_seeds = where[0] in ("comparison", "baselines")
    *keys, last = where[:-1] if of_seeds else where
    for key in keys:
        results = results.setdefault(key, {})
    if of_seeds:
        results.setdefault(last, []).append(result)
    else:
        results[last] = result
