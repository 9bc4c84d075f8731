"""How the passes of a fit or a sweep run, which does not change what is learned."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, TypedDict

from .. import defaults
from .._checks import check_counts, check_not_negative
from .._suggestions import did_you_mean
from .objective import Objective

#: Default memory budgets in bytes.
CACHE_BYTES, SPILL_BYTES = 2 << 30, 8 << 30

#: Keywords that a misspelt one may have meant.
_OF_FITS = (
    "objective", "steps", "lr", "batch_size", "seed", "schedule", "betas", "tolerance", "patience", "execution",
    "checkpoint", "progress", "evaluate_on", "folder", "warm_start", "at_once", "grid", "intervention",
)  # fmt: skip
_OF_OBJECTIVE = tuple(item.name for item in fields(Objective))


@dataclass(frozen=True, slots=True)
class Execution:
    """How the passes of a fit or a sweep run: it changes time and memory, and the result only to rounding.

    Args:
        accumulate: number of forward passes that an update is split into at least, to save memory. If memory runs out
            all the same, the passes are halved once, with a warning.
        cache_bytes: memory on the model's device for what is computed only once.
        spill_bytes: CPU memory for what exceeds `cache_bytes`; what exceeds both is computed again in each step.
        memory_bytes: memory for the activations of one pass; None: half of what is free. Larger batches run in several
            passes.
        capture: True: run the passes as CUDA graphs, with one launch each. "auto": the same where the model is on one
            GPU and the first three passes agree with plain ones; otherwise plain passes, with a warning if a capture
            fails. Not yet run on a GPU.
        recompute: True: the backward pass computes each layer again from its input, so that a pass keeps one hidden
            state per layer and not all activations; gradients are the same, and a step takes about 1.5 times as long.
            "auto": the same where a single prompt would not fit otherwise, or ran out of memory, and where layers are
            offloaded, whose weights would be kept with the activations; a line in the log says so. False: never. Not
            with `capture` or a compiled model.
        distributed: None: share the work with the other processes of an existing group, or of one that torchrun or
            accelerate describes, which then lasts until the end of the call; a worker of Ray works alone. True: share
            the work, and raise if there is only one process. False: work alone.

    Raises:
        ValueError: a count or a budget that is not an integer, or is too small; `capture` or `recompute` is something
            else, or both are True.
    """

    accumulate: int = defaults.ACCUMULATE
    cache_bytes: int = CACHE_BYTES
    spill_bytes: int = SPILL_BYTES
    memory_bytes: int | None = None
    capture: bool | Literal["auto"] = False
    distributed: bool | None = None
    recompute: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        check_counts(accumulate=self.accumulate)
        if not isinstance(self.capture, bool) and self.capture != "auto":
            raise ValueError(f"capture: got {self.capture!r}, expected True, False or 'auto'")
        if not isinstance(self.recompute, bool) and self.recompute != "auto":
            raise ValueError(f"recompute: got {self.recompute!r}, expected True, False or 'auto'")
        if self.recompute is True and self.capture is True:
            raise ValueError("recompute: got True with capture=True, expected one of them: graphs keep activations")
        check_not_negative(cache_bytes=self.cache_bytes, spill_bytes=self.spill_bytes)
        if self.memory_bytes is not None:
            check_not_negative(memory_bytes=self.memory_bytes)


class ExecutionKeywords(TypedDict, total=False):
    """The fields of `Execution` as keyword arguments of `fit` and `sweep`, as before it existed."""

    accumulate: int
    cache_bytes: int
    spill_bytes: int
    memory_bytes: int | None
    capture: bool | Literal["auto"]
    distributed: bool | None
    recompute: bool | Literal["auto"]


class FitKeywords(ExecutionKeywords, total=False):
    """Keyword arguments that `fit` took before `Execution` and `Checkpoint` existed, and still takes."""

    checkpoint_every: int


def with_keywords(execution: Execution | None, keywords: ExecutionKeywords, function: str) -> Execution:
    """`execution` with the fields that were passed as keywords.

    Raises:
        TypeError: an unknown keyword, or an execution of another type.
    """
    if execution is not None and not isinstance(execution, Execution):
        raise TypeError(f"execution: got {type(execution).__name__}, expected an Execution or None")
    for name in keywords:
        if name in _OF_OBJECTIVE:
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}, which is a field of the objective: "
                f"Objective({name}=…)"
            )
        if name not in ExecutionKeywords.__annotations__:
            hint = did_you_mean(name, [*ExecutionKeywords.__annotations__, *_OF_FITS, *_OF_OBJECTIVE])
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")
    return replace(execution or Execution(), **keywords)
