"""Learning an intervention's parameters with Adam and a proximal step, on a frozen model."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from .. import defaults
from .._tables import Readable
from ..architectures.model_origin import origin_of
from ..interventions import Intervention
from ..patching.patch import patch
from ..tasks.loading import ExampleSource
from ..verification.ensure import ensure_verified
from .activation_size import activation_sizes
from .arguments import checked_intervention, checked_objective, refuse_idle, refuse_inference_mode, refuse_tokenless
from .checkpoint import Checkpoint, check_writable_checkpoint
from .distributed import ProcessGroup, process_group
from .encoded_examples import EncodedExamples, evenly_spaced
from .engine import Engine, FitRequest
from .execution import Execution, FitKeywords, with_keywords
from .fit_n_active import check_n_active, choose_active, masks
from .fit_settings import FitSettings, Schedule
from .fit_state import FitState
from .identity import examples_identity, fit_identity, model_identity
from .minimality_share import resolved_minimality
from .objective import Objective
from .termination import saving_on_sigterm
from .zero_gradient import ZeroGradientWatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(slots=True, repr=False)
class FitResult(Readable):
    """A fitted intervention and how it was learned."""

    intervention: Intervention
    #: One record per step: step, loss, effectiveness, faithfulness, minimality, n_active, moved, lr. The loss and the
    #: first two terms belong to the parameters before the step; minimality (‖α‖₁) and n_active to those after it, so
    #: that the last record describes the fitted intervention. `moved` is the largest change of a parameter, and `lr`
    #: the learning rate, as a number or a share between 0 and 1. With sparsity="scalars", minimality is the norm of the
    #: scalars that were produced before the step.
    history: list[dict[str, float]] = field(repr=False)
    #: Duration of this call; a resumed fit counts only its own steps.
    seconds: float
    #: The objective, with numbers where shares were given.
    objective: Objective | None = None
    #: With `n_active`, one record per fit of the path: minimality (λ_M), n_active, effectiveness, faithfulness.
    path: list[dict[str, float]] = field(default_factory=list, repr=False)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text: the objective's terms at the first and the last step."""
        names = {"loss": "loss", "effectiveness": "E", "faithfulness": "F", "minimality": "‖α‖₁", "n_active": "active"}
        ends = [self.history[0], *self.history[-1:]] if len(self.history) > 1 else self.history
        rows = [
            [f"{record['step']:g}"] + [f"{record[name]:.4g}" if name in record else "" for name in names]
            for record in ends
        ]
        return ["step", *names.values()], rows

    def _heading(self) -> str:
        return f"Fit of {len(self.history)} steps in {self.seconds:.1f} s"

    def _notes(self) -> list[str]:
        found = self.intervention
        return [f"{found!r}: {found.n_active} of {found.n_parameters} parameters are active"]


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSource,
    intervention: Intervention,
    objective: Objective | None = None,
    *,
    steps: int = defaults.STEPS,
    lr: float | str = defaults.LR,
    batch_size: int = defaults.BATCH_SIZE,
    seed: int = defaults.SEED,
    schedule: Schedule = defaults.SCHEDULE,
    betas: tuple[float, float] = (0.9, 0.99),
    tolerance: float | None = None,
    patience: int = defaults.PATIENCE,
    n_active: int | None = None,
    execution: Execution | None = None,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    progress: bool = True,
    **keywords: Unpack[FitKeywords],
) -> FitResult:
    """Learn `intervention` in place so that it flips the examples' answers, changes little else and stays sparse.

    Each step runs the prompts of one batch under all directions, takes the losses and their gradient from one fused op,
    and updates all scalars in one launch: Adam, then the soft threshold that makes zeros exact. What the intervention
    cannot change is computed only once: layers below the lowest steered one, tokens before the first steered one, and
    the predictions of the frozen model. The model's weights, modes and gradients are left unchanged. Gradients are
    enabled inside, whatever the caller's mode is.

    Under torchrun or `accelerate launch` the processes split each batch; each must have the model and gets the result.

    Prompts end where the answer begins. Answers of one token need no generated token, so that the slot of
    `generated=True` learns nothing: it keeps its starting value 0 (the ℓ1 term takes any other value to 0, unless
    minimality=0). Where an answer has several tokens, the margin is on the difference of the answers'
    log-probabilities, log p(c) − log p(w), which for one token each is the logit difference; the prompt then runs with
    both answers, whose tokens are steered as generated tokens are.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer.
        examples: prompts with their two answers, as a list or whatever else `load_examples` takes, such as a path.
        intervention: for example `ActivScalar.for_model(model)`; its parameters are the starting point.
        objective: the weights of the three terms; None: `Objective()`.
        steps: number of updates.
        lr: Adam's learning rate. A share such as "5%": how far a step may change an activation, relative to its size,
            which is measured on the frozen model for each layer, so that it holds on models whose activations have
            other sizes: scalars move by 0.05, entries of a vector by 0.05·RMS, those of a probe of D entries by
            0.05/(D·RMS). A number: in the parameters' units, for all layers alike.
        batch_size: number of prompts per update; at most all examples.
        seed: determines the order of the examples.
        schedule: "cosine" or "linear" decay of the learning rate to 0, or "constant".
        betas: Adam's decay rates.
        tolerance, patience: stop early once no scalar has moved by more than `tolerance` in each of the last `patience`
            steps; None: never.
        n_active: the largest number of scalars that may be active; the objective's `minimality` and the values of the
            intervention are then not used. From α = 0, shorter fits with falling weights of the ℓ1 norm, each from the
            result of the one before, choose the scalars. These are then fitted without the ℓ1 term, which would pull
            them to 0, and all others stay exactly 0. There is no checkpoint. None: `minimality` decides.
        execution: how the passes run: memory budgets, gradient accumulation, recomputation, CUDA graphs, several
            processes.
        checkpoint: a file for the state, from which the fit resumes if it exists; or a `Checkpoint`, which also says
            how often it is written.
        progress: show a progress bar with the three terms, the number of active scalars and the time left.
        keywords: the fields of `Execution` (accumulate, cache_bytes, spill_bytes, memory_bytes, capture, distributed,
            recompute) and `checkpoint_every` are still accepted as keyword arguments, as before `execution` existed.

    Returns:
        FitResult with the intervention, the history of all steps (with `n_active`, those of the last fit) and the
        duration.

    Raises:
        TypeError, ValueError: bad arguments or examples, an intervention or a checkpoint that belongs to another model
            or fit, an intervention that acts only on generated tokens, or a gradient that is exactly 0 for every
            parameter; the message names the likely causes.
        RuntimeError: under torch.inference_mode(), where gradients cannot be enabled, or with distributed=True and only
            one process.
        OSError: the checkpoint cannot be written, which is found out before the model runs; the message names the path.
        FloatingPointError: a term became NaN or infinite; the message names the step and the term. The parameters are
            those of the step before.

    Example:
        >>> scalars = af.ActivScalar.for_model(model)
        >>> af.fit(model, tokenizer, examples, scalars, af.Objective(faithfulness=0.5), steps=40)
    """
    objective = checked_objective(objective)
    settings = FitSettings(steps, lr, batch_size, seed, schedule, betas, tolerance, patience)
    checkpoint = Checkpoint.of(checkpoint, keywords.pop("checkpoint_every", None))
    execution = with_keywords(execution, keywords, "fit")
    refuse_inference_mode("fit")
    paths = checked_intervention(intervention).paths
    objective, settings = objective.for_intervention(intervention), settings.for_intervention(intervention)
    if n_active is not None:
        check_n_active(n_active, intervention, checkpoint.path)
        objective = replace(objective, minimality=0.0)
    data = EncodedExamples(examples, tokenizer, model, paths)
    refuse_tokenless(intervention, data)
    ensure_verified(data.device, progress=progress)
    with process_group(execution.distributed, model) as processes:
        if checkpoint.path is not None:
            check_writable_checkpoint(checkpoint.path, processes=processes, new=True)
        # Refuses another model's intervention before any work, and moves the parameters to this model's device.
        patch(model, intervention).remove()
        refuse_idle(model, intervention)
        rows = range(len(data))
        identity = fit_identity(intervention, objective) | examples_identity(data, rows)
        identity |= model_identity(model, checkpoint.path is not None, processes)
        identity |= {"accumulate": execution.accumulate}
        state = FitState(intervention, objective, settings, rows, checkpoint=checkpoint.path, identity=identity)
        begun = time.perf_counter()
        state.resume(processes)
        # After all refusals, which leave the intervention unchanged.
        intervention.set_origin(origin_of(model, collective=True))
        if state.done():
            return _result(state, begun)
        engine = Engine(
            model, data, intervention, [objective], execution, processes, _stages(objective, settings, rows, processes)
        )
        if not state.full_steps.are_known:
            sizes = activation_sizes(model, data, intervention, rows, settings.lr)
            state.full_steps.set_sizes(processes.all_gather(sizes)[0])
        watch = ZeroGradientWatch(model, data, state)
        path: list[dict[str, float]] = []
        kept: list[Tensor] | None = None
        saving = saving_on_sigterm(checkpoint.path is not None)
        with saving, torch.enable_grad(), engine, _bar(state, progress and processes.is_rank_zero) as bar:
            try:
                if math.isnan(state.minimality):
                    state.resolve_minimality(resolved_minimality(engine, objective, rows))
                if n_active is not None:
                    path = choose_active(
                        engine, objective, settings, rows, n_active, processes.is_rank_zero and progress
                    )
                    kept = masks(intervention)
                while not state.done():
                    batch = state.rows()
                    terms, gradients = engine.gradients([FitRequest(batch, objective)])
                    watch.look(batch, terms[0], gradients)
                    if kept is not None:
                        gradients = [gradient * mask for gradient, mask in zip(gradients, kept, strict=True)]
                    state.update(terms[0], gradients)
                    if state.history:
                        bar.set_postfix_str(_summary(state.history[-1], intervention.n_parameters), refresh=False)
                    bar.update()
                    if state.taken % checkpoint.every == 0:
                        state.save()
                state.read(wait=True)
            finally:
                state.save()  # also after Ctrl-C, SIGTERM and a failed step, whose beginning is kept
        return _result(state, begun, path)


def _stages(
    objective: Objective, settings: FitSettings, rows: Sequence[int], processes: ProcessGroup
) -> list[list[int]]:
    """The rows that this process runs, in order: those that λ_max is measured on, then its part of each step."""
    measured = [] if objective.minimality_share is None else processes.shard(evenly_spaced(rows))
    used, size = settings.first_uses(len(rows)), settings.batch_size
    mine = [row for start in range(0, len(used), size) for row in processes.shard(used[start : start + size])]
    return [measured, mine]


def _result(state: FitState, begun: float, path: Sequence[dict[str, float]] = ()) -> FitResult:
    objective = replace(state.objective, minimality=state.minimality)
    return FitResult(state.intervention, state.history, time.perf_counter() - begun, objective, list(path))


def _summary(record: dict[str, float], n_parameters: int) -> str:
    """The state of a fit in one line."""
    return (
        f"E {record['effectiveness']:.2f}  F {record['faithfulness']:.2f}  ‖α‖₁ {record['minimality']:.2f}  "
        f"active {record['n_active']}/{n_parameters}"
    )


def _bar(state: FitState, show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(
        total=state.settings.steps, initial=state.taken, desc="fit", disable=not show, unit="step", dynamic_ncols=True
    )
