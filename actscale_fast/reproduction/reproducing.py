"""The whole run: stages that are files, a bar that says what is under way, and the report at the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..architectures.layout import layout
from ..learning.checkpoint import digest
from ..learning.weights_digest import weights_digest
from ..modules.evaluation_mode import evaluation_mode
from . import locating, recipes, transferring
from .comparing import Laboratory
from .pictures import draw, transferred
from .report import write_report
from .settings import FULL, QUICK, SYSTEMS, TASKS, Size
from .stages import Stages

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
    """Run every system on every task, and write one report of what came out: `report.md` with pictures beside it.

    Finished stages are files in the folder, fits under way are checkpoints: the same call goes on where a killed one
    ended. The claims of the abstract of arXiv 2410.04962 are judged by criteria that stand in the report.

    Args:
        model, tokenizer: a causal language model of Hugging Face and its tokenizer; the model is left as it was.
        folder: for the report; made where it is not there.
        quick: one seed and smaller counts, which the report says.
        size: counts of one's own instead (`actscale_fast.reproduction.Size`).
        progress: show a progress bar over the stages.

    Returns:
        The path of the report.

    Raises:
        ValueError: the folder holds a run of another model or size, or a task that the tokenizer has no words for.
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
    for task in TASKS:  # a tokenizer without the words says so before anything is run
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
    """(place in the results, what is computed) of every stage, in the order in which they depend on each other."""
    plan: list[Stage] = []
    scalars = SYSTEMS[0]
    for seed in lab.size.seeds:
        for task in TASKS:
            for system in SYSTEMS:
                plan.append(
                    (
                        ("comparison", task.name, system.name, str(seed)),
                        lambda task=task, system=system, seed=seed: lab.compare(task, system, seed),  # type: ignore[misc]
                    )
                )
            plan.append(
                (
                    ("baselines", task.name, str(seed)),
                    lambda task=task, seed=seed: lab.baselines(task, scalars, seed),  # type: ignore[misc]
                )
            )
    for task in TASKS:
        plan += [
            (("knock-out", task.name), lambda task=task: locating.knock_out(lab, task, scalars)),  # type: ignore[misc]
            (("path", task.name), lambda task=task: locating.path(lab, task, scalars)),  # type: ignore[misc]
            (("transfer", task.name), lambda task=task: transferring.transfer(lab, task, transferred())),  # type: ignore[misc]
        ]
    for name in ("act-add", "mean-centring", "instruction", "latent"):
        recipe: Callable[[Laboratory], Any] = getattr(recipes, name.replace("-", "_"))
        plan.append((("recipes", name), lambda recipe=recipe: recipes.attempted(recipe, lab)))  # type: ignore[misc]
    return plan


def _put(results: dict[str, Any], where: tuple[str, ...], result: Any) -> None:
    """A result at its place; those of seeds are lists."""
    if where[0] in ("comparison", "baselines"):
        *keys, last = where[:-1]
        _inner(results, keys).setdefault(last, []).append(result)
    else:
        *keys, last = where
        _inner(results, keys)[last] = result


def _inner(results: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    for key in keys:
        results = results.setdefault(key, {})
    return results
