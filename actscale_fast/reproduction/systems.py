"""The size of a reproduction, and its systems, objectives and tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

from .. import tasks
from ..interventions import ActivScalar, DynScalar, Intervention, SteerVec
from ..learning import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..tasks import TaskSplit


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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"seeds": list(self.seeds)}


FULL = Size(
    seeds=(0, 1, 2), n_train=192, n_test=64, steps=48, n_path=5, path_steps=16, n_attributed=8, n_sentences=10,
    max_new_tokens=30,
)  # fmt: skip
QUICK = Size(
    seeds=(0,), n_train=64, n_test=32, steps=20, n_path=3, path_steps=8, n_attributed=4, n_sentences=4,
    max_new_tokens=20,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """A task in two forms: prompts of any length, and prompts whose tokens are aligned."""

    name: str
    title: str
    held_out: str
    split: Callable[..., TaskSplit]

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, size: Size, seed: int, *, aligned: bool = False
    ) -> TaskSplit:
        return self.split(tokenizer, size.n_train, size.n_test, seed, aligned)


def _capitals(tokenizer: Any, n_train: int, n_test: int, seed: int, aligned: bool) -> TaskSplit:
    """Country-capital conflicts: one wording and capitals of any length; if aligned, eight wordings and one token."""
    counts: dict[str, Any] = {"n_train": n_train, "n_test": n_test, "seed": seed}
    if aligned:
        return tasks.country_capital_conflicts(
            tokenizer, templates=tasks.ALIGNED_CONFLICT_TEMPLATES, aligned=True, **counts
        )
    return tasks.country_capital_conflicts(
        tokenizer, templates=tasks.CONFLICT_TEMPLATES[:1], whole_names=False, **counts
    )


def _indirect_objects(tokenizer: Any, n_train: int, n_test: int, seed: int, aligned: bool) -> TaskSplit:
    return tasks.indirect_object_identification(tokenizer, n_train=n_train, n_test=n_test, seed=seed, aligned=aligned)


TASKS = (
    Task("country-capital", "Country-capital conflicts", "countries", _capitals),
    Task("indirect-object", "Indirect object identification", "templates", _indirect_objects),
)

#: The two sites of the paper's main comparison.
_SITES = ("attn_out", "mlp_out")


@dataclass(frozen=True, slots=True)
class System:
    """A kind of intervention, with the objective and the learning rate that it is fitted with."""

    name: str
    title: str
    cls: type[Intervention]
    aligned: bool  # learned on prompts of one length with aligned tokens
    objective: Objective
    lr: float
    share: float = 1.0  # of the steps: systems with more parameters need fewer
    sites: tuple[str, ...] = ("head",)

    def make(self, model: PreTrainedModel, n_tokens: int) -> Intervention:
        """A new intervention; `n_tokens` is the length of the aligned prompts."""
        positions = range(n_tokens) if self.aligned and not self.cls.shares_positions else None
        parts: Iterable[Intervention] = [
            self.cls.for_model(model, site=site, positions=positions) for site in self.sites
        ]
        return reduce(lambda first, second: first + second, parts)


SYSTEMS = (
    System("scalars", "ActivScalar, a head", ActivScalar, False, Objective(minimality=0.25, faithfulness=0.3), 0.05),
    System("vectors", "SteerVec, a head", SteerVec, False, Objective(minimality=0.02, faithfulness=0.3), 0.01, 0.5),
    System("probes", "DynScalar, a head", DynScalar, True, Objective(minimality=0.02, faithfulness=0.3), 0.01, 0.5),
    System(
        "scalars-by-position", "ActivScalar, a site and position", ActivScalar, True,
        Objective(minimality=0.1, faithfulness=0.3), 0.05, 0.5, _SITES,
    ),
    System(
        "vectors-by-position", "SteerVec, a site and position", SteerVec, True,
        Objective(minimality=0.002, faithfulness=0.3), 0.01, 0.5, _SITES,
    ),
)  # fmt: skip
