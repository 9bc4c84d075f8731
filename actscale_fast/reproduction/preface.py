"""What a report says first: its size, what its seeds and intervals cover, and the command that it is of."""

from __future__ import annotations

from dataclasses import replace

from .laboratory import Laboratory
from .size import FULL, QUICK, Size
from .systems import system_named


def preface(lab: Laboratory, quick: bool, seconds: float) -> str:
    """The first paragraph; `seconds` is the time of all stages."""
    size, n = lab.size, len(lab.size.seeds)
    seeds = f"{n} seed{'s' * (n > 1)}"
    words = [
        f"**A quick run: {seeds}, and fewer prompts, settings and steps than the full report, so that intervals are "
        "wide.** A seed chooses the order of training and what is held out."
        if quick
        else f"{seeds}, for the order of training and what is held out.",
        f"Per task, {size.n_train} prompts to learn from, {size.n_validation} to choose weights, rates and strengths "
        f"by, and {size.n_test} test prompts; within a seed the three have different countries (capitals) or different "
        "templates (names).",
        "Weights, rates and strengths are chosen once, with the training and validation prompts of the first seed; the "
        "test prompts of other seeds may share countries or templates with these."
        if n > 1
        else "",
        "Brackets are 95 % bootstrap intervals, which resample seeds and the prompts of each as if these were "
        "independent. Several prompts ask for one country, or have one template; what other countries and templates "
        "would give is not covered, so that the intervals are rather too narrow.",
        f"{round(seconds / 60)} minutes in total. The method is that of arXiv 2410.04962. The hinge, the direction of "
        "the KL and the exclusion of the answers are choices of `actscale_fast`. No figure from the paper is used.",
    ]
    return " ".join(filter(None, words))


def moved_sites(lab: Laboratory) -> list[str]:
    """What the scalars per site and position edit, where it is not the sites themselves: a paragraph, or none."""
    system = system_named("scalars-by-position")
    norms = [norm for site in system.sites if (norm := system.place(lab.model, site).get("mlp"))]
    if not norms:
        return []
    return [
        "In this model norms undo factors on what attention or the MLP returns. The scalars per site and position "
        f"therefore act on the norms' outputs ({' and '.join(f'`{norm}`' for norm in norms)}); the vectors act before "
        "the norms, where they have an effect."
    ]


def command_of(size: Size) -> str:
    """The command that runs a report of this size, or the call where no command does."""
    for base, option in ((FULL, ""), (QUICK, " --quick")):
        if size == replace(base, seeds=tuple(range(len(size.seeds)))):
            seeds = "" if size.seeds == base.seeds else f" --seeds {len(size.seeds)}"
            return f"actscale-fast reproduce{option}{seeds}"
    return "af.reproduce(…, size=Size(…))"
