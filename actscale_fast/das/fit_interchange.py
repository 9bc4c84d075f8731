"""Fitting Boundless DAS on pairs of a base and a source: where does a model keep a causal variable?"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .._checks import check_counts
from ..architectures.hugging_face import unwrap
from ..architectures.model_origin import origin_of
from ..architectures.sharding import is_sharded
from ..learning import checkpoint as checkpoints
from ..learning.arguments import refuse_inference_mode
from ..learning.broken_connections import explained_where_sharded
from ..learning.encoded_examples import EncodedExamples
from ..learning.fit_settings import FitSettings
from ..learning.identity import examples_identity, model_identity
from ..learning.termination import saving_on_sigterm
from ..patching.patch import Patch
from ..tasks.examples import sources_of
from ..tasks.loading import ExampleSource
from .boundless_das import BoundlessDAS
from .interchange_state import InterchangeState, Plan
from .pairs import Pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(slots=True)
class InterchangeResult:
    """A fitted interchange, with the record of its fit."""

    intervention: BoundlessDAS
    #: One record per step: step, loss, cross_entropy, accuracy (the share of the step's pairs for which the
    #: counterfactual answer is the most likely token), boundary (the mean), temperature, lr (of the rotations).
    history: list[dict[str, float]] = field(repr=False)
    #: The duration of this call; steps of a fit that it resumed are not included.
    seconds: float


def fit_interchange(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSource,
    das: BoundlessDAS,
    *,
    epochs: int = 3,
    steps: int | None = None,
    batch_size: int = 16,
    accumulate: int = 1,
    rotation_lr: float = 1e-3,
    boundary_lr: float = 1e-2,
    boundary_weight: float = 1.0,
    temperature: tuple[float, float] = (50.0, 0.1),
    warmup: float = 0.1,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> InterchangeResult:
    """Learn an interchange in place, so that it gives the examples' counterfactual answers.

    Minimises cross-entropy(correct answer at the last token, over the whole vocabulary) + boundary_weight · mean
    boundary with Adam on a frozen model (arXiv 2305.08809). The sources' activations, the layers below the lowest
    interchange and the tokens before the first one are computed only once.

    The learning rates, weight, temperatures, warm-up, epochs and pairs per forward pass are the published settings,
    which were made for 8000 pairs and a 7B model and used four passes of 16 pairs per update (batch_size=64,
    accumulate=4). These choices are ours: one pass per update, since a small set of pairs would leave few updates;
    linear decay to 0 after the warm-up; the boundary is clamped to [1e-3, 1] after each step, and the mean of several
    boundaries is minimised.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer.
        examples: bases (`prompt`) with their `source`; `correct` is the counterfactual answer.
        das: its rotations and boundaries are the starting point; it ends at the last temperature.
        epochs: how often each pair is used.
        steps: the number of updates, instead of epochs.
        batch_size: pairs per update; at most all examples.
        accumulate: passes into which an update is split to save memory; the gradient is the same up to rounding.
        rotation_lr, boundary_lr: Adam's learning rates.
        boundary_weight: the weight of the mean boundary in the loss.
        temperature: the first and the last; linear in between.
        warmup: share of the steps.
        seed: seed of the order of the examples.
        checkpoint: a file to which the state is written atomically every `checkpoint_every` steps, at the end, and on
            Ctrl-C or SIGTERM. If it exists, the fit resumes from it, with the same bits as without the interruption.
        progress: show a progress bar.

    Returns:
        InterchangeResult.

    Raises:
        TypeError, ValueError: bad arguments or examples, an example without a source, a checkpoint of another fit.
        OSError: the checkpoint cannot be written, which is checked before the model runs; the message names the path.
        RuntimeError: called in torch.inference_mode().
        FloatingPointError: the loss or its gradient is not finite; no parameter was changed by that step.

    Example:
        >>> das = BoundlessDAS.for_model(model, layers=[22], positions=[-1])
        >>> fit_interchange(model, tokenizer, train, das)
        >>> evaluate(model, tokenizer, test, das).flip_to_correct  # interchange accuracy between the two answers
    """
    if not isinstance(das, BoundlessDAS):
        raise TypeError(f"das: got {type(das).__name__}, expected a BoundlessDAS (fit learns others)")
    check_counts(epochs=epochs, batch_size=batch_size, accumulate=accumulate, checkpoint_every=checkpoint_every)
    refuse_inference_mode("fit_interchange")
    data = EncodedExamples(examples, tokenizer, model, das.location.paths)
    data.refuse_long_answers("fit_interchange learns from the next token alone")
    texts = sources_of(data.examples)
    if steps is None:
        steps = epochs * math.ceil(len(data) / batch_size)
    settings = FitSettings(steps=steps, lr=rotation_lr, batch_size=batch_size, seed=seed, schedule="constant")
    plan = Plan(settings, accumulate, boundary_lr, boundary_weight, temperature, warmup)
    if checkpoint is not None:
        if is_sharded(unwrap(model)):
            raise ValueError(
                "checkpoint: fit_interchange keeps none of a model that is sharded over processes; omit it"
            )
        checkpoints.check_writable_checkpoint(checkpoint, new=True)
    Patch(model, das).remove()  # refuses another model's interchange, and moves the parameters to this model's device
    begun = time.perf_counter()
    identity: dict[str, Any] = {}
    if checkpoint is not None:
        identity = plan.to_dict() | {"intervention": type(das).__name__, "location": das.location.to_dict()}
        identity |= examples_identity(data, range(len(data))) | model_identity(model, True)
    fit = InterchangeState(das, plan, checkpoint, identity)
    fit.resume()
    das.set_origin(origin_of(model, collective=True))  # after all refusals, which leave the intervention unchanged
    if fit.taken < steps:
        if checkpoint is not None:
            checkpoints.check_writable_checkpoint(checkpoint, fit.tensors())
        sources = das.source_activations(model, tokenizer, texts, progress=progress)
        saving = saving_on_sigterm(checkpoint is not None)
        sharing, pairing = explained_where_sharded(model), Pairs(model, data, das, sources)
        with saving, sharing, torch.enable_grad(), pairing as pairs, _bar(fit, progress) as bar:
            try:
                while fit.taken < steps:
                    fit.step(pairs)
                    bar.set_postfix_str(_summary(fit.history[-1]), refresh=False)
                    bar.update()
                    if fit.taken % checkpoint_every == 0:
                        fit.save()
            finally:
                fit.save()
    return InterchangeResult(das, fit.history, time.perf_counter() - begun)


def _summary(record: dict[str, float]) -> str:
    return f"loss {record['loss']:.3f}  accuracy {record['accuracy']:.2f}  boundary {record['boundary']:.3f}"


def _bar(fit: InterchangeState, show: bool) -> Any:
    from tqdm.auto import tqdm

    total = fit.plan.steps.steps
    return tqdm(total=total, initial=fit.taken, desc="interchange", disable=not show, unit="step", dynamic_ncols=True)
