"""How large a reproduction is: seeds, prompts, steps, and what is compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

#: Settings that are tried on validation prompts: factors on the defaults of faithfulness, ℓ1 weight and learning rate.
#: One factor changes at a time. Fits here take fewer steps than by default, so that weaker penalties and a higher rate
#: are tried.
STAR = ((1, 1, 1), (1 / 3, 1, 1), (1, 1 / 3, 1), (1, 1, 2))
SHORT = ((1, 1, 1), (1 / 3, 1 / 3, 1))

#: Methods of `compare_heads` that share their scores, and so a stage.
METHODS = (
    ("random", "random-refit"), ("attribution", "attribution-refit"), ("knock-out", "knock-out-refit"),
    ("activ-scalar",), ("juice-once", "juice"), ("sami",), ("sadi",), ("head-pursuit",), ("gates",),
    ("gates-contrastive",),
)  # fmt: skip
QUICK_METHODS = (("random",), ("attribution", "attribution-refit"), ("sami",), ("head-pursuit",))


@dataclass(frozen=True, slots=True)
class Size:
    """The counts of a run."""

    seeds: tuple[int, ...]
    n_train: int
    n_test: int
    steps: int
    n_path: int  # number of weights of the ℓ1 norm on the path
    path_steps: int
    n_attributed: int  # number of prompts for the knock-outs
    n_sentences: int  # number of latent vectors
    max_new_tokens: int
    n_validation: int = 24
    batch_size: int = 6
    grid: tuple[tuple[float, float, float], ...] = STAR
    tuning_steps: int = 16
    methods: tuple[tuple[str, ...], ...] = METHODS
    head_counts: tuple[int, ...] = (5, 10, 20, 40)
    head_strengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    head_steps: int = 16
    n_scored: int = 32  # number of prompts that heads are scored on
    n_transferred: int = 16  # test prompts per seed and form
    transfer_seeds: int = 2
    n_generated: int = 12  # test prompts that are continued
    #: The systems whose stress tests are run.
    stressed: tuple[str, ...] = ("scalars", "few-scalars", "vectors")
    n_stressed: int = 16  # test prompts of a stress test
    time_seeds: int = 1  # seeds of the table with equal time; 0: there is none
    remedy_seeds: int = 1  # seeds of what is tried for open claims; 0: nothing is tried

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        return {name: _listed(value) for name, value in found.items()}


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


#: About two hours per model of 100 million parameters (without embeddings) on two cores.
FULL = Size(
    seeds=(0, 1, 2, 3, 4), n_train=96, n_test=48, steps=24, n_path=6, path_steps=10, n_attributed=4, n_sentences=5,
    max_new_tokens=20,
)  # fmt: skip
QUICK = Size(
    seeds=(0,), n_train=24, n_test=16, steps=8, n_path=3, path_steps=3, n_attributed=1, n_sentences=2,
    max_new_tokens=12, n_validation=8, batch_size=4, grid=SHORT, tuning_steps=4, methods=QUICK_METHODS,
    head_counts=(5, 20), head_strengths=(1.0, 3.0), head_steps=6, n_scored=12, n_transferred=4, transfer_seeds=1,
    n_generated=4, stressed=("few-scalars",), n_stressed=4, time_seeds=0, remedy_seeds=0,
)  # fmt: skip
