"""The commands fit, evaluate, generate, plot and merge."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from .. import defaults, learning, plots
from .._json import write_json
from ..frozen.chat import user_message
from ..interventions import ActivScalar, DynScalar, Intervention, SteerVec, load_intervention
from ..patching.merge import merge as merge_into_weights
from ..tasks.known_prompts import conflict_kind
from .generating import as_result, generate_texts
from .loading import (
    check_chat_template,
    check_file,
    check_folder,
    examples_for,
    load_files,
    load_model,
    output_folder,
)
from .model_of_fit import load_model_of_fit
from .options import RECOMPUTE, given_paths
from .output import check_sources, print_continuations, print_evaluation, print_table, say
from .provenance import load_saved, provenance
from .record import keep_learned, measure_learned
from .saved_with_examples import saved_with_examples
from .verbosity import shows_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fit(options: argparse.Namespace) -> int:
    """Learn an intervention, save it with its history, and evaluate it if there are held-out examples."""
    if options.n_active is not None and options.minimality is not None:
        raise ValueError("--n-active chooses the weight of the ℓ1 norm and cannot be used with --minimality")
    options.lr = options.lr or defaults.LR
    objective = learning.Objective(
        margin=options.margin,
        faithfulness=options.faithfulness,
        minimality="default" if options.minimality is None else options.minimality,
        exclude_answers=not options.include_answers,
        kl=options.kl,
        directions=(1,) if options.one_direction else (1, -1),
        sparsity=options.sparsity,
    )
    files = load_files(options)
    check_file(options.checkpoint, "checkpoint")
    out = output_folder(options.out)
    model, tokenizer = load_model(options)
    train, test = examples_for(options, tokenizer, options.seed, files)
    intervention = _at_rest(options, model)
    # For the record; with --n-active there is no weight.
    options.minimality = None if options.n_active is not None else objective.for_intervention(intervention).minimality
    result = learning.fit(
        model,
        tokenizer,
        train,
        intervention,
        objective,
        steps=options.steps,
        lr=options.lr,
        batch_size=options.batch_size,
        seed=options.seed,
        progress=shows_progress(options),
        schedule=options.schedule,
        n_active=options.n_active,
        accumulate=options.accumulate,
        recompute=RECOMPUTE[options.recompute],
        checkpoint=options.checkpoint,
        checkpoint_every=options.checkpoint_every,
    )
    keep_learned(out, options, result, **provenance(model, train, test, result.objective))
    evaluation = None
    if test:
        evaluation = learning.evaluate(model, tokenizer, test, result.intervention)
        measure_learned(out, evaluation, "Held-out examples")
    options.result = {
        "out": str(out),
        "n_active": intervention.n_active,
        "n_parameters": intervention.n_parameters,
        "l1": intervention.l1,
        "steps": len(result.history),
        "seconds": round(result.seconds, 2),
        "last": dict(result.history[-1]) if result.history else None,
        "evaluation": None if evaluation is None else evaluation.to_dict(),
    }
    what = "scalars" if options.kind == "activ-scalar" else "numbers"
    if isinstance(options.minimality, str) and result.objective is not None:
        weight = result.objective.minimality
        say(f"--minimality {options.minimality} is {weight}: 100% is the smallest weight with no active {what}")
    say(f"{intervention.n_active} of {intervention.n_parameters} {what} are active; saved in {out}")
    return 0


def _at_rest(options: argparse.Namespace, model: PreTrainedModel) -> Intervention:
    """A new intervention of the given kind, at every given site."""
    kinds: dict[str, type[Intervention]] = {
        "activ-scalar": ActivScalar,
        "steer-vec": SteerVec,
        "dyn-scalar": DynScalar,
    }
    where = {"layers": options.layers, "positions": options.positions, "generated": options.generated}
    paths = given_paths(options)
    parts = [kinds[options.kind].for_model(model, site=site, **where, **paths) for site in options.site]
    return functools.reduce(lambda first, second: first + second, parts)


def evaluate(options: argparse.Namespace) -> int:
    """Print the figures before and after, on the examples that the fit held out unless others are named."""
    check_file(options.out, "out")
    given = saved_with_examples(options)
    everything = (given.model, given.tokenizer, given.examples, given.intervention)
    kinds_of = set(map(conflict_kind, given.examples))
    kinds = None
    if None not in kinds_of and len(kinds_of) > 1:  # questions without a context alone may be anyone's
        kinds = learning.evaluate_conflicts(*everything, batch_size=options.batch_size)
    evaluation = learning.evaluate(*everything, batch_size=options.batch_size) if kinds is None else kinds.mean
    print_evaluation(given.title, evaluation)
    options.result = evaluation.to_dict()
    if kinds is not None:
        print_table("By kind of conflict (parametric: the correct answer, contextual: the wrong one)", *kinds.table())
        options.result |= {"kinds": kinds.to_dict()["kinds"]}
    if options.out is not None:
        write_json(Path(options.out), options.result)
    return 0


def generate(options: argparse.Namespace) -> int:
    """Continue prompts under every strength, greedily or by drawing tokens."""
    if not all(options.prompt):
        raise ValueError("prompt: got '', which has no tokens")
    strengths = [number for part in options.strength or [[-1.0, 0.0, 1.0]] for number in part]
    intervention = load_saved(options.intervention)
    model, tokenizer = load_model_of_fit(options, Path(options.intervention), intervention)
    prompts, sources = options.prompt, options.source or []
    check_sources(intervention, sources, len(prompts))
    if options.chat:
        check_chat_template(tokenizer)
        prompts, sources = ([user_message(text) for text in texts] for texts in (prompts, sources))
    texts = generate_texts(options, model, tokenizer, intervention, prompts, strengths, sources)
    for prompt, answers in zip(options.prompt, texts, strict=True):
        if not options.stream:
            print_continuations(prompt, strengths, answers)
    options.result = as_result(options.prompt, strengths, texts)
    return 0


def plot(options: argparse.Namespace) -> int:
    """Draw an intervention or a history."""
    if options.history is not None:
        plots.history(options.history, options.out, title=options.title or "Terms of the objective at each step")
    else:
        plots.heatmap(load_intervention(options.intervention), options.out, title=options.title)  # type: ignore[arg-type]
    say(f"wrote {options.out}")
    return 0


def merge(options: argparse.Namespace) -> int:
    """Save a model with the intervention in its weights."""
    check_folder(Path(options.out))
    intervention = load_saved(options.intervention)
    model, tokenizer = load_model_of_fit(options, Path(options.intervention), intervention)
    merge_into_weights(model, intervention, strength=options.strength)
    out = output_folder(options.out)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    say(f"saved the merged model in {out}")
    return 0
