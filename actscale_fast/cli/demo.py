"""`actscale-fast demo`: from conflicts to an intervention that is measured, saved and used."""

from __future__ import annotations

import argparse
import functools
import resource
import shlex
import sys
import time
from dataclasses import asdict

from .. import defaults, learning, plots, tasks
from .._checks import share_of
from .._json import write_json, write_sealed
from ..interventions import ActivScalar
from .loading import load_model, output_folder
from .options import N_TEST, N_TRAIN
from .output import continuations, print_continuations, print_evaluation, say
from .provenance import provenance
from .record import save_record
from .verbosity import shows_progress

_STRENGTHS = (-1.0, 0.0, 1.0)
#: After "A:" alone this small model often starts a new line; with this beginning, its answer is the next word.
_ANSWER = " The capital of {country} is"
_SHOWN, _MAX_NEW_TOKENS = 3, 10
#: The first wording of the task: on the longer ones a step takes up to twice as long.
_N_TEMPLATES = 1


def demo(options: argparse.Namespace) -> int:
    """Learn one scalar per attention head on country-capital conflicts, measure, save, draw and generate."""
    begun = time.perf_counter()
    out = output_folder(options.out)
    model, tokenizer = load_model(options)

    templates = tasks.CONFLICT_TEMPLATES[:_N_TEMPLATES]
    split = functools.partial(tasks.country_capital_conflicts, tokenizer, seed=options.seed)
    train, test = split(n_train=N_TRAIN, n_test=N_TEST, templates=templates)
    say(f"1. {len(train)} conflicts to learn from, {len(test)} about countries that are held out, such as")
    say(f"   {test[0].prompt!r}: correct is {test[0].correct!r}, wrong is {test[0].wrong!r}")

    scalars = ActivScalar.for_model(model)
    say(f"2. learning {scalars.n_parameters} scalars, one for each attention head, in {options.steps} steps")
    objective = learning.Objective()
    result = learning.fit(
        model,
        tokenizer,
        train,
        scalars,
        objective,
        steps=options.steps,
        seed=options.seed,
        progress=shows_progress(options),
    )

    evaluation = learning.evaluate(model, tokenizer, test, scalars)
    print_evaluation("3. Held-out countries", evaluation)

    scalars.save_pretrained(out)
    plots.heatmap(scalars, out / "heads.png")
    plots.history(result, out / "history.png", title="Terms of the objective at each step")
    write_sealed(out / "history.json", result.history)
    used = result.objective or objective
    settings = {
        "n_train": N_TRAIN,
        "n_test": N_TEST,
        "n_templates": _N_TEMPLATES,
        "max_new_tokens": _MAX_NEW_TOKENS,
        "steps": options.steps,
        "seed": options.seed,
        "lr": share_of(defaults.LR),  # scalars are factors: the share is the step
        "batch_size": defaults.BATCH_SIZE,
        **asdict(used),
        "minimality": objective.for_intervention(scalars).minimality,  # the share
        "minimality_weight": used.minimality,  # and the number that the fit found it to be
    }
    source = provenance(model, train, test, result.objective)
    split_options = {"chat": False, "aligned": False, "split": None}
    save_record(out, options, task="country-capital", **split_options, **settings, **source)
    begun_answers = split(n_train=1, n_test=_SHOWN, templates=[templates[0] + _ANSWER]).test
    texts = {
        example.prompt: continuations(model, tokenizer, scalars, [example.prompt], _STRENGTHS, _MAX_NEW_TOKENS)[0]
        for example in begun_answers
    }
    report = {
        "model": options.model or "SmolLM2-135M-Instruct",
        "settings": settings,
        "held_out": evaluation.to_dict(),
        "strengths": _STRENGTHS,
        "continuations": texts,
        "seconds_fit": round(result.seconds, 1),
        "seconds": round(time.perf_counter() - begun, 1),
        "peak_memory_gib": round(_peak_memory_gib(), 2),
    }
    write_json(out / "demo.json", report)
    say(f"4. saved in {out}: the intervention, heads.png, history.png, demo.json. Held-out countries, three strengths:")
    for prompt, answers in texts.items():
        say()
        print_continuations(prompt, _STRENGTHS, answers)
    took = f"{report['seconds']} s in total, of which learning took {report['seconds_fit']} s"
    say(f"{took}; peak memory {report['peak_memory_gib']} GiB")
    say(f"Next: actscale-fast generate --intervention {out} --prompt {shlex.quote(begun_answers[0].prompt)}")
    return 0


def _peak_memory_gib() -> float:
    """The most memory this process has held: getrusage counts KiB on Linux, bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 30 if sys.platform == "darwin" else 1 << 20)
