"""The whole run on one model: stages whose results are files, and the report at the end."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._log import notice
from .._version import __version__
from ..architectures.layout import layout
from ..architectures.weights_digest import weights_digest
from ..learning.checkpoint import digest
from ..modules.evaluation_mode import evaluation_mode
from .laboratory import Laboratory
from .plan import Stage, put, remedy_stages, stages
from .report import write_report
from .size import FULL, QUICK, Size
from .stages import Stages
from .systems import SYSTEMS
from .task_forms import TASKS
from .tokenizer_digest import tokenizer_digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Stages after which the time of the whole run is estimated.
_FIRST = 3


def reproduce(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    *,
    quick: bool = False,
    size: Size | None = None,
    progress: bool = True,
) -> Path:
    """Run every system on every task and write a report: `report.md` with pictures, `report.html`, and CSV files.

    Finished stages are files in the folder, so the same call continues a run that was killed.
    The report judges the claims of the abstract of arXiv 2410.04962 by criteria that it states: each is held, not held,
    or not decided, by its interval over seeds and prompts. Weights, rates and strengths are chosen once, on
    validation prompts of the first seed. Within a seed these share no country (or template) with the training and test
    prompts; the test prompts of the other seeds may share countries or templates with them.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer; the model is left unchanged.
        folder: output folder.
        quick: use one seed and smaller counts; the report says so.
        size: your own counts instead (`actscale_fast.reproduction.Size`).
        progress: show a progress bar.

    Returns:
        The path of `report.md`; the other files are beside it.

    Raises:
        ValueError: the folder holds a run with another model, tokenizer or size, or the tokenizer lacks the words of a
            task.
    """
    if quick and size is not None:
        raise ValueError("size: given together with quick=True, expected one or the other")
    chosen = size or (QUICK if quick else FULL)
    found = layout(model)
    settings = {
        "version": __version__,
        "model": found.model_type,
        "weights": weights_digest(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "dtype": str(next(model.parameters()).dtype),
        "systems": digest([repr(system) for system in SYSTEMS]),
        **chosen.to_dict(),
    }
    lab = Laboratory(model, tokenizer, chosen, Path(folder))
    for task in TASKS:  # fails early if the tokenizer lacks the words
        for aligned in (False, True):
            task.examples(tokenizer, chosen, chosen.seeds[0], aligned=aligned)
    kept = Stages(lab.folder, settings)
    _run(lab, kept, progress=progress)
    return write_report(lab, quick=chosen == replace(QUICK, seeds=chosen.seeds), seconds=kept.seconds)


def _run(lab: Laboratory, kept: Stages, *, progress: bool) -> None:
    """Run all stages that are missing, and collect the results of all."""
    from tqdm.auto import tqdm

    planned = list(stages(lab))
    with tqdm(total=len(planned), desc="reproduce", disable=not progress, unit="stage", dynamic_ncols=True) as bar:
        _run_some(lab, kept, planned, bar)
        more = list(remedy_stages(lab))
        bar.total += len(more)
        _run_some(lab, kept, more, bar)


def _run_some(lab: Laboratory, kept: Stages, planned: Sequence[Stage], bar: Any) -> None:
    """Run these stages; after the first ones that are not there yet, say how long the others will take."""
    missing = [stage for stage in planned if not kept.has(stage.name)]
    for stage in planned:
        bar.set_postfix_str(" ".join(stage.where))
        with evaluation_mode(lab.model):
            result = kept.run(stage.name, stage.compute)
        put(lab.results, stage.where, result)
        bar.update()
        if len(missing) > _FIRST and stage is missing[_FIRST - 1]:
            cost, rest = (sum(one.cost for one in some) for some in (missing[:_FIRST], missing[_FIRST:]))
            minutes = sum(kept.taken[one.name] for one in missing[:_FIRST]) / cost * rest / 60
            notice(
                f"reproduce: about {minutes:.0f} more minutes for {len(missing) - _FIRST} stages, by the first {_FIRST}"
            )
