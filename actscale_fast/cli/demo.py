"""`actscale-fast demo`: the whole way, from conflicts to an intervention that is kept and used."""

from __future__ import annotations

import argparse
import resource
import shlex
import sys
import time
from dataclasses import asdict, replace

from .. import learning, plots
from ..interventions import ActivScalar
from .loading import load_model, output_folder
from .output import continuations, print_continuations, print_evaluation, say, write_json
from .settings import DEMO

_STRENGTHS = (-1.0, 0.0, 1.0)


def demo(options: argparse.Namespace) -> int:
    """Learn one scalar per attention head on country-capital conflicts, measure, save, draw and generate."""
    settings = replace(DEMO, steps=options.steps, seed=options.seed)
    begun = time.perf_counter()
    out = output_folder(options.out)
    model, tokenizer = load_model(options)

    train, test = learning.tasks.country_capital_conflicts(
        tokenizer,
        n_train=settings.n_train,
        n_test=settings.n_test,
        seed=settings.seed,
        templates=learning.tasks.CONFLICT_TEMPLATES[: settings.n_templates],
    )
    say(f"1. {len(train)} conflicts to learn from, {len(test)} with countries that are held out, such as")
    say(f"   {test[0].prompt!r}: correct is {test[0].correct!r}, wrong is {test[0].wrong!r}")

    scalars = ActivScalar.for_model(model)
    say(f"2. learning {scalars.n_parameters} scalars, one an attention head, in {settings.steps} steps")
    result = learning.fit(
        model,
        tokenizer,
        train,
        scalars,
        learning.Objective(margin=settings.margin, faithfulness=settings.faithfulness, minimality=settings.minimality),
        steps=settings.steps,
        lr=settings.lr,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )

    evaluation = learning.evaluate(model, tokenizer, test, scalars)
    print_evaluation("3. Held-out countries", evaluation)

    scalars.save_pretrained(out)
    plots.heatmap(scalars, out / "heads.png")
    plots.history(result, out / "history.png")
    write_json(out / "history.json", result.history)
    # Behind a statement the next token is the answer; behind "A:" this small model often starts with a new line.
    prompt = next((example.prompt for example in test if example.prompt.endswith(" is")), test[0].prompt)
    texts = continuations(model, tokenizer, scalars, prompt, _STRENGTHS, settings.max_new_tokens)
    report = {
        "model": options.model or "SmolLM2-135M-Instruct",
        "settings": asdict(settings),
        "held_out": evaluation.to_dict(),
        "prompt": prompt,
        "continuations": {f"{strength:+g}": text for strength, text in zip(_STRENGTHS, texts, strict=True)},
        "seconds_fit": round(result.seconds, 1),
        "seconds": round(time.perf_counter() - begun, 1),
        "peak_memory_gib": round(_peak_memory_gib(), 2),
    }
    write_json(out / "demo.json", report)
    say(f"4. saved in {out}: the intervention, heads.png, history.png, demo.json. Three strengths:")
    say()
    print_continuations(prompt, _STRENGTHS, texts)
    took = f"{report['seconds']} s in all, {report['seconds_fit']} s of them learning"
    say(f"{took}; peak memory {report['peak_memory_gib']} GiB")
    say(f"Go on with: actscale-fast generate --intervention {out} --prompt {shlex.quote(prompt)}")
    return 0


def _peak_memory_gib() -> float:
    """The most memory this process has held: getrusage counts KiB on Linux, bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 30 if sys.platform == "darwin" else 1 << 20)
