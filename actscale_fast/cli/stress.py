"""`actscale-fast stress`: does a saved intervention hold on other prompts, and what does it cost elsewhere?"""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import learning
from .._json import parsed, read_limited
from ..learning.stress.behaviours import UNRELATED
from ..learning.stress.harness import harness_accuracies
from .loading import check_file
from .output import say, show
from .saved_with_examples import saved_with_examples
from .verbosity import shows_progress

#: The options that are thresholds.
THRESHOLDS = (
    "min_control", "min_gain", "max_perplexity_ratio", "max_kl", "max_accuracy_drop", "max_drop", "max_side_effect",
)  # fmt: skip


def stress(options: argparse.Namespace) -> int:
    """Print the stress test of an intervention, and write it where --out and --plot say."""
    check_file(options.out, "out")
    check_file(options.plot, "plot")
    texts = None if options.texts is None else _lines(Path(options.texts), "texts")
    accuracies = None
    if options.harness is not None:
        frozen, *steered = (parsed(read_limited(Path(name)), finite=False) for name in options.harness)
        accuracies = harness_accuracies(frozen, *steered)
    given = saved_with_examples(options)
    examples = given.examples[: options.n_prompts]
    result = learning.stress(
        given.model, given.tokenizer, given.intervention, examples, strength=options.strength,
        direction=options.direction, perturbations=options.perturbations, texts=texts, accuracies=accuracies,
        task=options.task if options.task in UNRELATED else None,
        seed=options.stress_seed, batch_size=options.batch_size, progress=shows_progress(options),
        **{name: getattr(options, name) for name in THRESHOLDS},
    )  # fmt: skip
    say(f"{given.title}: {len(examples)} prompts")
    show(str(result))
    options.result = result.to_dict()
    if options.out is not None:
        result.save(options.out)
    if options.plot is not None:
        result.plot(options.plot)
    return 0


def _lines(path: Path, name: str) -> list[str]:
    """The lines of a text file that are not blank."""
    if not path.is_file():
        raise FileNotFoundError(f"{name}: there is no file {path}")
    found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{name}: {path} has no text")
    return found
