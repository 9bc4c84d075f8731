"""The engine: opens a frozen model for the steps of one fit or of many, and computes their gradients."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from ...architectures.layout import layout
from ...architectures.sharding import model_processes
from ...architectures.site_check import skipped
from ...interventions import DynScalar, Intervention
from ...modules.evaluation_mode import evaluation_mode
from ..broken_connections import is_broken_connection
from ..distributed import SINGLE_PROCESS, ProcessGroup
from ..encoded_examples import EncodedExamples
from ..execution import Execution
from ..objective import Objective
from .cuda_graphs import check_capturable, is_capturable
from .gradient_check import GradientCheck
from .microbatches import FitRequest, PackedRow, RequestedPrompt, tokens
from .step_runner import STRATEGIES, StepRunner, Strategy, patched_for_steps
from .token_budget import out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Engine:
    """Terms and gradients of an intervention on a frozen model; a context manager.

    Args:
        model: a causal language model, plain or compiled; frozen and in evaluation mode while the engine is open.
        data: the encoded examples.
        intervention: a single intervention, or a stack for several fits at once.
        objectives: the objectives that the requests will have.
        execution: memory budgets, gradient accumulation and CUDA graphs. On a CPU, passes have no more tokens than are
            fast together, even if more would fit.
        processes: the processes that share each step's prompts.
        stages: the examples in the order in which steps will probably use them. It decides which of them the frozen
            model runs together, when one of them is used for the first time, and so must not depend on where a fit
            resumes. None: in their own order.

    Raises:
        ValueError: `capture` for a model that is not on one GPU, an objective that the intervention
            does not support, or answers of several tokens with `capture` or sparsity="scalars".
    """

    def __init__(
        self, model: PreTrainedModel, data: EncodedExamples, intervention: Intervention,
        objectives: Iterable[Objective], execution: Execution | None = None, processes: ProcessGroup = SINGLE_PROCESS,
        stages: Sequence[Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        self.objectives = list(objectives)
        penalises_scalars = any(objective.sparsity == "scalars" for objective in self.objectives)
        if penalises_scalars and not isinstance(intervention, DynScalar):
            name = type(intervention).__name__
            raise ValueError(f"objective: sparsity='scalars' requires a DynScalar, which produces them; got a {name}")
        if penalises_scalars:
            data.refuse_long_answers("sparsity='scalars' is a mean over the tokens of the prompts alone")
        self.execution = execution or Execution()
        if self.execution.capture == "auto" and (data.long_answers or not is_capturable(model)):
            self.execution = replace(self.execution, capture=False)
        if self.execution.recompute is True and self.execution.capture:
            self.execution = replace(self.execution, capture=False)
        elif self.execution.capture:
            self.execution = replace(self.execution, recompute=False)  # graphs keep activations
        if self.execution.capture is True:
            data.refuse_long_answers("capture=True records passes on prompts alone")
            check_capturable(model)
        self.model, self.data, self.intervention, self.processes = model, data, intervention, processes
        self.stages = stages
        self.found = layout(model, intervention.paths)
        #: The processes that hold the model with this one, and must run as many passes.
        self.together = model_processes(self.found.model)
        self.halved = False
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        problems: list[str] = []
        check = self._gradient_check()
        for strategy in STRATEGIES:
            try:
                problem = self._open_with(strategy, check)
            except Exception as error:
                self._open.close()
                hopeless = strategy is STRATEGIES[-1] or out_of_memory(error) or is_broken_connection(error)
                if hopeless or not self._fails_again(strategy, check):
                    raise
                problem = f"{type(error).__name__}: {error}"
            problem = next((one for one in self.together.all_gather(problem) if one is not None), None)
            if problem is None:
                break
            self._open.close()
            problems.append(f"{strategy.name}: {problem}")
        else:
            raise RuntimeError(
                f"model: steps of {type(self.found.model).__name__} do not give what its forward pass gives: "
                f"{'; '.join(problems)}"
            )
        if problems:
            warnings.warn(
                f"{type(self.found.model).__name__}: {'; '.join(problems)}; continuing {strategy.name}, which takes "
                "longer",
                stacklevel=3,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def gradients(self, requests: Sequence[FitRequest]) -> tuple[Tensor, list[Tensor]]:
        """The terms and gradients of E + λ_F·F for one step. Nothing waits for a GPU.

        Returns:
            The terms [requests, 3]: effectiveness and faithfulness (means over a request's prompts, sums over its
            directions) and the ℓ1 norm of the produced scalars if it is penalised (a mean over both, else 0); and the
            gradient of each parameter.
        """
        prompts = [RequestedPrompt(index, row) for index, request in enumerate(requests) for row in request.rows]
        prompts = self.processes.shard(prompts)
        runner, planner = self.runner, self.runner.planner
        while True:
            microbatches = self._agreed_microbatches(prompts, requests)
            try:
                terms, gradients = runner.sums(microbatches, requests)
                break
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if out_of_memory(error) and self.together.size > 1:  # the others wait inside the pass
                    other = "" if runner.recomputation.is_on else ", or recompute=True"
                    raise type(error)(
                        f"{error}\nprocess {self.together.rank} of the {self.together.size} that hold the model ran "
                        "out of memory in a pass, which cannot be repeated with fewer tokens because the others are in "
                        f"it too; set memory_bytes= to less, or accumulate= to more{other}"
                    ) from error
                if not out_of_memory(error):
                    raise
                if self.halved or not _divisible(microbatches):
                    if not runner.recomputation.may_begin:
                        raise
                    runner.begin_recomputation("memory ran out in passes that cannot be made smaller, or already were")
                    continue
            self.halved = True  # once
            largest = planner.halve(microbatches, requests)
            warnings.warn(
                f"out of memory with {largest} tokens in a pass; continuing with at most {planner.max_tokens}",
                stacklevel=3,
            )
        self.processes.all_reduce_([terms, *gradients])
        return terms, gradients

    def _agreed_microbatches(
        self, prompts: Sequence[RequestedPrompt], requests: Sequence[FitRequest]
    ) -> list[list[PackedRow]]:
        """The microbatches of these prompts.

        Processes that hold the model together cannot repeat a pass in which one of them ran out of memory. So they
        look before the step. Where one of them has too little left for a single prompt, all recompute their layers from
        then on; where it has too little for a pass of several, all make smaller passes.
        """
        runner, planner, together = self.runner, self.runner.planner, self.together
        microbatches = planner.microbatches(prompts, requests)
        while together.size > 1:
            too_large = runner.too_large(microbatches, requests)
            several = [tokens(rows, requests) for rows in too_large if _divisible([rows])]
            found = together.all_gather((len(too_large) > len(several), max(several, default=0)))
            largest = max(tokens_of_several for _, tokens_of_several in found)
            if any(single for single, _ in found) and runner.recomputation.may_begin:
                who = self._named(single for single, _ in found)
                runner.begin_recomputation(f"too little memory is left for a single prompt in {who}")
            elif largest:
                planner.max_tokens = max(largest // 2, 1)
                who = self._named(tokens_of_several for _, tokens_of_several in found)
                warnings.warn(
                    f"too little memory is left for {largest} tokens in a pass in {who}; all processes that hold the "
                    f"model continue with at most {planner.max_tokens}",
                    stacklevel=4,
                )
                microbatches = planner.microbatches(prompts, requests)
            else:
                break
        return microbatches

    def _named(self, found: Iterable[object]) -> str:
        """The processes of which something was found, for a message."""
        ranks = [str(rank) for rank, one in zip(self.together.ranks, found, strict=True) if one]
        return f"process{'es' * (len(ranks) > 1)} {', '.join(ranks)}"

    def _gradient_check(self) -> GradientCheck | None:
        """What the plain whole model gives for two prompts; None if checks are skipped."""
        if skipped():
            return None
        with evaluation_mode(self.model), patched_for_steps(self.model, self.intervention) as patched:
            group = None if self.intervention.n_groups is None else 0
            check = GradientCheck(
                self.found.model, self.data, self.intervention, patched, group, self.objectives[0],
                self.execution.recompute,
            )  # fmt: skip
            check.check_plain_gradient()
        return check

    def _fails_again(self, strategy: Strategy, check: GradientCheck | None) -> bool:
        """Whether opening the model with this strategy fails again; other errors are not the strategy's fault."""
        try:
            self._open_with(strategy, check)
        except Exception:
            return True
        else:
            return False
        finally:
            self._open.close()

    def _open_with(self, strategy: Strategy, check: GradientCheck | None) -> str | None:
        """Open the model; returns how its steps differ from the plain whole model, or None if they agree."""
        with contextlib.ExitStack() as stack:
            runner = StepRunner(
                self.model, self.data, self.intervention, self.objectives, self.execution, strategy, self.stages
            )
            self.runner = stack.enter_context(runner)
            problem = None if check is None else self._disagreement(check)
            self._open = stack.pop_all()
        return problem

    def _disagreement(self, check: GradientCheck) -> str | None:
        """How the engine differs from the plain whole model, or None if it agrees."""
        requests = [FitRequest(check.rows, check.objective)]
        prompts = [RequestedPrompt(0, row) for row in check.rows]
        return check.disagreement(
            lambda: self.runner.sums(self.runner.planner.microbatches(prompts, requests), requests)
        )


def _divisible(microbatches: Sequence[Sequence[PackedRow]]) -> bool:
    """Whether these prompts could run in smaller passes."""
    return any(len(rows) > 1 or len(rows[0].prompts) > 1 for rows in microbatches)
