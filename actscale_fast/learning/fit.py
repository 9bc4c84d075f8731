"""Learning an intervention's parameters with Adam and a proximal step, on a frozen model."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .. import defaults
from .._checks import check_bytes, check_counts
from ..architectures.layout import layout, unwrap
from ..architectures.location import Location
from ..architectures.site_check import idle_layers
from ..interventions import Composite, Intervention, Projection
from ..patching.patch import patch
from ..tasks.examples import Example, example_fields
from . import checkpoint as checkpoints, distributed as parallel
from .encoded_examples import EncodedExamples
from .engine import CACHE_BYTES, SPILL_BYTES, Engine, Share
from .fit_settings import FitSettings, Schedule
from .fit_state import Run
from .objective import Objective
from .termination import saving_on_sigterm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(slots=True)
class FitResult:
    """A fitted intervention and how it came about."""

    intervention: Intervention
    #: One record a step: step, loss, effectiveness, faithfulness, minimality, n_active, moved, lr. The two terms and
    #: the loss are those of the parameters that the step began with; minimality (‖α‖₁) and n_active those that it left,
    #: so that the last record tells the fitted intervention's; moved is the largest change of a scalar. Under
    #: sparsity="scalars" minimality is the norm of the produced scalars, of the step's beginning.
    history: list[dict[str, float]] = field(repr=False)
    #: Of this call; a resumed fit counts its own steps only.
    seconds: float


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    intervention: Intervention,
    objective: Objective | None = None,
    *,
    steps: int = defaults.STEPS,
    lr: float = defaults.LR,
    batch_size: int = defaults.BATCH_SIZE,
    seed: int = defaults.SEED,
    schedule: Schedule = defaults.SCHEDULE,
    betas: tuple[float, float] = (0.9, 0.99),
    tolerance: float | None = None,
    patience: int = defaults.PATIENCE,
    accumulate: int = defaults.ACCUMULATE,
    cache_bytes: int = CACHE_BYTES,
    spill_bytes: int = SPILL_BYTES,
    memory_bytes: int | None = None,
    capture: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = defaults.CHECKPOINT_EVERY,
    distributed: bool | None = None,
    progress: bool = True,
) -> FitResult:
    """Learn `intervention` in place so that it flips the examples' answers, leaves other tokens alone and stays sparse.

    Each step runs the prompts of one batch under all directions, takes the losses and their gradient from one fused op,
    and updates all scalars in one launch: Adam, then the soft threshold that makes zeros exact. What the intervention
    cannot change is computed once: layers below the lowest steered one, tokens before the first steered one, and what
    the frozen model said. The model's weights, modes and gradients are left as they were. Gradients are enabled inside,
    whatever the caller's mode.

    Under torchrun or `accelerate launch` the processes split each batch; each must have the model and gets the result.

    Examples end where the answer begins: no token is generated. The slot of `generated=True` therefore learns nothing:
    it stays at its starting value, 0 (the ℓ1 term takes any other start to 0; minimality=0 leaves it).

    Args:
        model, tokenizer: a causal language model of Hugging Face and its tokenizer.
        examples: prompts with their two answers.
        intervention: for example `ActivScalar.for_model(model)`; its parameters are the starting point.
        objective: the weights of the three terms; `Objective()` where None.
        steps: number of updates.
        lr: Adam's learning rate, in units of the scalars; `schedule` lets it fall to 0 by a cosine or a line, or not.
        batch_size: prompts an update; larger than the number of examples means all of them.
        seed: of the order of the examples.
        betas: Adam's.
        tolerance, patience: stop early once no scalar has moved by more than `tolerance` in each of the last `patience`
            steps; None: never.
        accumulate: forward passes an update is split into at least, to save memory; the gradient is the same to
            rounding. Where memory runs out all the same, passes are halved once, with a warning.
        cache_bytes: memory on the model's device for what is computed once; what is over goes to CPU memory, up to
            `spill_bytes`, and is computed again in each step beyond that.
        memory_bytes: for the activations of one pass; None: half of what is free. Larger batches run in several passes.
        capture: run passes as CUDA graphs, one launch each. Not run on a GPU yet.
        checkpoint: a file that the state is written to, atomically, every `checkpoint_every` steps and at the end.
            Where it exists the fit resumes from it, to the same bits as an uninterrupted one. Ctrl-C and SIGTERM save.
        distributed: None: with the other processes of a group that exists or that torchrun describes; False: alone.
        progress: show a progress bar with the three terms, the number of active scalars and the time left.

    Returns:
        FitResult with the intervention, the history of each step and the seconds taken.

    Raises:
        TypeError, ValueError: bad arguments or examples, an intervention or a checkpoint of another model or fit, an
            intervention on generated tokens alone.
        RuntimeError: under torch.inference_mode(), which gradients cannot be enabled in, or distributed=True with one
            process only.
        OSError: the checkpoint cannot be written, found out before the model runs; names the path.
        FloatingPointError: a term became NaN or infinite; names the step and the term. The parameters are those of the
            step before.

    Example:
        >>> scalars = af.ActivScalar.for_model(model)
        >>> af.fit(model, tokenizer, examples, scalars, af.Objective(faithfulness=0.5), steps=40)
    """
    objective = checked_objective(objective)
    settings = FitSettings(steps, lr, batch_size, seed, schedule, betas, tolerance, patience)
    check_counts(accumulate=accumulate, checkpoint_every=checkpoint_every)
    check_bytes(cache_bytes=cache_bytes, spill_bytes=spill_bytes, memory_bytes=memory_bytes)
    refuse_inference_mode("fit")
    paths = checked_intervention(intervention).paths
    data = EncodedExamples(examples, tokenizer, model, paths)
    world = parallel.join(distributed)
    if checkpoint is not None:
        checkpoints.check_place(checkpoint, world=world, new=True)
    # Refuses another model's intervention before any work, and moves the parameters to this model's device.
    patch(model, intervention).remove()
    refuse_idle(model, intervention)
    every = range(len(data))
    identity = fit_identity(intervention, objective) | examples_identity(data, every)
    identity |= model_identity(model, checkpoint is not None, world) | {"accumulate": accumulate}
    run = Run(intervention, objective, settings, every, checkpoint=checkpoint, identity=identity)
    begun = time.perf_counter()
    run.resume(world)
    if run.done():
        return FitResult(intervention, run.history, time.perf_counter() - begun)
    engine = Engine(
        model, data, intervention, [objective], cache_bytes=cache_bytes, spill_bytes=spill_bytes,
        memory_bytes=memory_bytes, accumulate=accumulate, capture=capture, world=world,
    )  # fmt: skip
    saving = saving_on_sigterm(checkpoint is not None)
    with saving, torch.enable_grad(), engine, _bar(steps, run.taken, progress and world.leads) as bar:
        try:
            while not run.done():
                terms, gradients = engine.gradients([Share(run.rows(), objective)])
                run.update(terms[0], gradients)
                if run.history:
                    bar.set_postfix_str(summary(run.history[-1], intervention.n_parameters), refresh=False)
                bar.update()
                if world.leads and run.taken % checkpoint_every == 0:
                    run.save()
            run.read(wait=True)
        finally:
            if world.leads:  # also after Ctrl-C and SIGTERM, and where a step failed: the state before it is kept
                run.save()
    return FitResult(intervention, run.history, time.perf_counter() - begun)


def fit_identity(intervention: Intervention, objective: Objective) -> dict[str, Any]:
    """What makes a fit this fit and not another one, beside its settings, examples and model: JSON."""
    return {
        "objective": asdict(objective) | {"directions": list(objective.directions)},
        "intervention": type(intervention).__name__,
        "location": _places(intervention),
    }


def examples_identity(data: EncodedExamples, rows: Sequence[int]) -> dict[str, Any]:
    """What tells these examples, and the tokens that they are for a tokenizer, from others."""
    correct, wrong = data.correct.tolist(), data.wrong.tolist()
    return {
        "examples": checkpoints.digest([example_fields(data.examples[row]) for row in rows]),
        "tokens": checkpoints.digest(
            [[data.prompts[row] for row in rows], [correct[row] for row in rows], [wrong[row] for row in rows]]
        ),
    }


def model_identity(model: PreTrainedModel, kept: bool, world: parallel.World = parallel.ALONE) -> dict[str, Any]:
    """What tells this model from others of its shape.

    Args:
        model: as the caller gave it.
        kept: whether something is written that must belong to this model: then a weight that cannot be read is a
            ValueError.
        world: several processes compare their models where they can.
    """
    if not kept and world.size == 1:
        return {}
    try:
        return {"model": checkpoints.weights_digest(model)}
    except ValueError:
        if kept:
            raise
        return {}


def checked_objective(objective: Any) -> Objective:
    """The objective, or the default one."""
    objective = Objective() if objective is None else objective
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: got {type(objective).__name__}, expected an Objective or None")
    return objective


def _places(intervention: Intervention) -> Any:
    places = [single.location.to_dict() for single in intervention.singles]
    return [list(intervention.factors), places] if isinstance(intervention, Composite) else places[0]


def checked_location(intervention: Any) -> Location:
    """Where an intervention of one place acts, refused where no example reaches it."""
    if isinstance(intervention, Composite):
        raise TypeError("intervention: got a Composite, expected one of a single place")
    return checked_intervention(intervention).location


def checked_intervention(intervention: Any) -> Intervention:
    """The intervention, refused where no example reaches it."""
    if not isinstance(intervention, Intervention):
        raise TypeError(f"intervention: got {type(intervention).__name__}, expected an Intervention")
    for single in intervention.singles:
        if single.needs_source:
            raise TypeError(f"intervention: a {type(single).__name__} is learned by fit_interchange")
        if isinstance(single, Projection) and not single.directions.any():
            raise ValueError(
                "intervention: a Projection whose directions are 0 has no gradient; begin with one that was extracted"
            )
    if all(single.location.positions == () for single in intervention.singles):
        raise ValueError(
            "intervention: it acts on generated tokens alone (positions=[], generated=True), and examples have none: "
            "nothing to learn"
        )
    return intervention


def refuse_idle(model: PreTrainedModel, intervention: Intervention) -> None:
    """ValueError where no part of the intervention can change what the model says: a norm undoes its factors."""
    for single in intervention.singles:
        location = single.location
        idle = idle_layers(layout(model, location.paths), location.site, location.layers) if single.multiplies else []
        if len(idle) < len(location.layers):
            return
    sites = ", ".join(sorted({repr(single.location.site) for single in intervention.singles}))
    raise ValueError(
        f"intervention: at {sites} of {type(unwrap(model)).__name__} a factor changes nothing: a norm without scale "
        "follows the site, so there is nothing to learn; use site='head', or a SteerVec"
    )


def refuse_inference_mode(what: str) -> None:
    """RuntimeError where gradients cannot be enabled."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{what} needs gradients, which torch.inference_mode() rules out; call it outside that mode")


def summary(record: dict[str, float], n_parameters: int) -> str:
    """One state of a fit in a line."""
    return (
        f"E {record['effectiveness']:.2f}  F {record['faithfulness']:.2f}  ‖α‖₁ {record['minimality']:.2f}  "
        f"active {record['n_active']}/{n_parameters}"
    )


def _bar(steps: int, done: int, show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=steps, initial=done, desc="fit", disable=not show, unit="step", dynamic_ncols=True)
