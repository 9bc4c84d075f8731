"""Runs steps on a frozen model that is opened with one strategy."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from ...architectures.layout import layout
from ...architectures.sharding import model_processes
from ...frozen.batching import forward_arguments
from ...frozen.shortcuts import open_frozen_model
from ...interventions import Intervention
from ...modules.evaluation_mode import evaluation_mode
from ...ops import canary
from ...patching.patch import AnyPatch, patch
from ..encoded_examples import EncodedExamples
from ..execution import Execution
from ..objective import Objective
from .active_region import ActiveRegion, active_region
from .answer_collate import AnswerCollator
from .collate import Collator
from .cuda_graphs import CudaGraphs, ProbedGraphs
from .forward_backward import ForwardBackward
from .microbatches import FitRequest, MicrobatchPlanner, PackedRow, RequestedPrompt, tokens
from .packing_check import may_pack, packing_matches
from .recomputation import Recomputation
from .reference_cache import ReferenceCache, reference_passes
from .row_store import RowStore
from .shared_layers import shared_below
from .token_budget import PEAK_OVER_KEPT, SHARE_OF_FREE, KeptBytes, free_bytes, tokens_that_fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Strategy:
    """Which parts of the computation a step leaves out."""

    name: str
    prefix: bool  # tokens before the first steered one, and common beginnings of prompts
    partial: bool  # layers below the lowest steered one, and the head's logits of all but the last token


#: From the fastest to the plain one; the first that agrees with the whole model is used.
STRATEGIES = (
    Strategy("with all shortcuts", True, True),
    Strategy("with whole prompts", False, True),
    Strategy("with the whole model in every step", False, False),
)

#: Number of prompts that show whether a model takes several in a row.
_PROBED = 3


class StepRunner:
    """Opens a model with one strategy and runs microbatches on it; a context manager.

    Args:
        model, data, intervention, objectives, execution: as for `Engine`.
        strategy: what the steps leave out.
        stages: as for `Engine`.
    """

    def __init__(
        self, model: PreTrainedModel, data: EncodedExamples, intervention: Intervention,
        objectives: Sequence[Objective], execution: Execution, strategy: Strategy,
        stages: Sequence[Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.data, self.intervention = model, data, intervention
        self.objectives, self.execution, self.strategy, self.stages = objectives, execution, strategy, stages
        self.found = layout(model, intervention.paths)
        self.parameters = [value for value in intervention.parameters() if value.requires_grad]
        #: Whether each row has to be a single prompt and direction, from the first layer on.
        self.penalises_scalars = any(objective.sparsity == "scalars" for objective in objectives)
        self.on_cpu = data.device.type == "cpu"
        self.together = model_processes(self.found.model)
        #: Whether other processes take part in this one's passes with other rows (FSDP2).
        self.rows_differ = not self.together.same_rows
        self.bytes_per_token = 0.0  # at the peak of a pass
        self._bytes_per_token_recomputed = 0.0
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        data, strategy = self.data, self.strategy
        with contextlib.ExitStack() as stack:
            data.alike_only = not strategy.partial
            stack.callback(setattr, data, "alike_only", False)
            stack.enter_context(evaluation_mode(self.model))
            arguments = forward_arguments(self.model, data.batch([0]))
            self.head, section = stack.enter_context(
                open_frozen_model(self.found, self.model, arguments, shortcuts=strategy.partial)
            )
            patched = patched_for_steps(self.model, self.intervention)
            stack.callback(patched.remove)
            self.partial = section.partial
            self.section = section
            region = active_region(self.intervention, data)
            width = region.width if strategy.prefix else region.longest
            self.region = ActiveRegion(region.first_layer if self.partial else 0, width, region.longest)
            self.planner = MicrobatchPlanner(
                data, self.region, self.found.hidden_size, self.on_cpu, self.execution.accumulate
            )
            passes = reference_passes(data, self.stages)
            order = [row for rows in passes for row in rows]
            self.store = RowStore(len(data), self.execution.cache_bytes, self.execution.spill_bytes, order)
            options = sorted({objective.loss_options.kl for objective in self.objectives})
            self.cache = cache = ReferenceCache(
                self.model, self.found, data, self.region, section, patched, self.head, self.store, passes, options
            )
            collator = AnswerCollator if data.long_answers else Collator
            self.collator = collator(data, cache, self.intervention.n_groups is not None, bool(self.execution.capture))
            self.forward_backward = ForwardBackward(
                self.model, section, patched, self.head, self.found.n_layers, self.parameters
            )
            capture = self.execution.capture
            runs = {True: CudaGraphs, "auto": ProbedGraphs}[capture] if capture else None
            self.compute = (runs(self.forward_backward) if runs else self.forward_backward).compute
            longest = max(range(len(data)), key=lambda row: len(data.prompts[row]))
            cache.fill([longest])
            if self.together.size > 1:  # parts of the vocabulary, and of the heads, differ in size
                self.store.keep_at_most(min(self.together.all_gather(self.store.n_kept)))
            if self.rows_differ and cache.keeps_rows and self.together.any(not self.store.holds_all):
                if not self.region.is_whole:
                    raise ValueError(
                        "cache_bytes and spill_bytes do not hold what is constant for all prompts, and processes that "
                        "hold a model together cannot compute it again on their own"
                    )
                self.store.keep_nothing()  # all of them run the frozen model before every pass
            if strategy.prefix and patched.alone:  # another patch may distinguish between rows or positions
                self.planner.packs = self._packing_matches(cache)
            self.recomputation = Recomputation(self.found, self.model, section, self.execution.recompute)
            self._bound_tokens(longest)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        if kind is None:
            canary.collect(wait=True)  # before anybody relies on the result

    def sums(self, microbatches: list[list[PackedRow]], requests: Sequence[FitRequest]) -> tuple[Tensor, list[Tensor]]:
        """The terms and gradients of some microbatches; see `Engine.gradients`."""
        terms = torch.zeros(len(requests), 3, dtype=torch.float32, device=self.intervention.device)
        gradients = [torch.zeros_like(value) for value in self.parameters]
        shared = self._shared_below(requests)
        n_passes = max(self.together.all_gather(len(microbatches)))  # of the processes that hold the model together
        used = {prompt.row for rows in microbatches for row in rows for prompt in row.prompts}
        self.cache.fill(used if len(microbatches) == n_passes else used | {requests[0].rows[0]})
        for rows in microbatches:
            found = self.compute(self.collator.collate(rows, requests, shared))
            for total, added in zip([terms, *gradients], found, strict=True):
                total += added.to(total.device)
        for _ in range(n_passes - len(microbatches)):  # others need this process in theirs; the result is not used
            row = self.planner.unpacked(RequestedPrompt(0, requests[0].rows[0]))
            self.compute(self.collator.collate([row], requests, shared))
        self.cache.begin(())  # what was computed for the last microbatch is not needed any more
        if self.penalises_scalars:  # a mean over directions, as the norm of parameters is the same for both
            for index, request in enumerate(requests):
                terms[index, 2] /= len(request.objective.directions)
        return terms, gradients

    def too_large(self, microbatches: list[list[PackedRow]], requests: Sequence[FitRequest]) -> list[list[PackedRow]]:
        """Those of these passes that need more memory than is free."""
        free = free_bytes(self.data.device)
        return [rows for rows in microbatches if tokens(rows, requests) * self.bytes_per_token > free]

    def begin_recomputation(self, why: str) -> None:
        """Let all further passes recompute their layers; processes that hold the model together do it together."""
        self.recomputation.begin(why)
        self.bytes_per_token = self._bytes_per_token_recomputed

    def _shared_below(self, requests: Sequence[FitRequest]) -> int:
        one_direction = all(len(request.objective.directions) == 1 for request in requests)
        if not self.partial or not self.on_cpu or self.penalises_scalars or one_direction or self.rows_differ:
            return 0
        return shared_below(self.intervention, [request.group for request in requests], self.found.n_layers)

    def _packing_matches(self, cache: ReferenceCache) -> bool:
        """Whether prompts may be packed, and the frozen model then gives the same results.

        Not on a GPU, where a mask would rule out the fast attention kernels (not measured).
        """
        apart = self.penalises_scalars or self.head is None or self.execution.accumulate > 1
        longest = max(len(sequence) for row in range(len(self.data)) for sequence in self.data.sequences(row))
        if not self.on_cpu or apart or not may_pack(self.model, self.found, self.intervention, longest):
            return False
        distinct = {tuple(prompt): row for row, prompt in enumerate(self.data.prompts)}
        if len(distinct) < 2:
            return False
        shortest = sorted(distinct, key=len)[:_PROBED]
        bound = self.planner.max_tokens or 0
        if len(shortest[0]) * max(len(objective.directions) for objective in self.objectives) > bound:
            return False  # a row of several would be too wide for a pass
        if sum(map(len, shortest)) > bound:  # the mask takes memory that grows with the square
            shortest = shortest[:2]
        prompts = [RequestedPrompt(0, distinct[prompt]) for prompt in shortest]
        (row,) = self.planner.packed(prompts, sum(len(self.data.joined(prompt.row)) for prompt in prompts))
        assert row.tree is not None
        paths = iter(row.tree.paths)  # the first one of each prompt
        columns = []
        for prompt in row.prompts:
            first, *_ = itertools.islice(paths, len(self.data.sequences(prompt.row)))
            columns.append(first[len(self.data.prompts[prompt.row]) - 1])
        examples = [prompt.row for prompt in row.prompts]
        cache.begin(examples)
        alone = cache.outputs(examples)
        matches = packing_matches(cache, self.collator.packed_tokens([row]), columns, alone)
        return self.together.leaders(matches)

    def _bound_tokens(self, longest: int) -> None:
        """Count what the longest prompt keeps for its backward, and bound the tokens of a microbatch accordingly."""
        rows = [self.planner.unpacked(RequestedPrompt(0, longest))]
        requests = [FitRequest([longest], self.objectives[0])]
        inputs, n_tokens = self.collator.collate(rows, requests), tokens(rows, requests)
        kept, before = KeptBytes([self.found.model]), self.section.wrap_layer
        if not self.recomputation.is_compiled:  # whose layers cannot be told apart
            self.section.wrap_layer = kept.layer
        with torch.enable_grad(), kept:
            self.forward_backward.losses(inputs)
        self.section.wrap_layer = before
        budget = self.execution.memory_bytes
        if budget is None:
            budget = int(SHARE_OF_FREE * free_bytes(self.data.device))
        fit = tokens_that_fit(kept.n_bytes, n_tokens, budget)
        n_bytes = kept.n_bytes_recomputed if self.recomputation.is_on else kept.n_bytes
        self.bytes_per_token = PEAK_OVER_KEPT * n_bytes / n_tokens
        self._bytes_per_token_recomputed = PEAK_OVER_KEPT * kept.n_bytes_recomputed / n_tokens
        if self.together.any(self.recomputation.may_begin and fit < n_tokens):
            size = f"{PEAK_OVER_KEPT * kept.n_bytes / 1e9:.3g} GB"
            self.begin_recomputation(f"a prompt of {n_tokens} tokens in all directions would take about {size}")
            n_bytes = kept.n_bytes_recomputed
        fit = min(self.together.all_gather(tokens_that_fit(n_bytes, n_tokens, budget)))
        fit = 1 << (fit.bit_length() - 1)  # a power of two, so that small changes of free memory change nothing
        bound = self.planner.max_tokens
        self.planner.max_tokens = fit if bound is None else min(fit, bound)


def patched_for_steps(model: PreTrainedModel, intervention: Intervention) -> AnyPatch:
    """The intervention's patch, for which each pass sets its rows."""
    grouped = intervention.n_groups is not None
    return patch(model, intervention, group=torch.zeros(0, dtype=torch.int64, device="cpu") if grouped else None)
