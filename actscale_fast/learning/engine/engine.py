"""The engine: opens a frozen model for the steps of one fit or of many, and takes their gradients."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from ...architectures.arguments import accepted_arguments
from ...architectures.families import FAMILIES
from ...architectures.layout import layout
from ...architectures.site_check import skipped
from ...frozen.batching import forward_arguments
from ...frozen.shortcuts import opened
from ...interventions import DynScalar, Intervention
from ...modules.evaluation_mode import frozen
from ...patching.patch import AnyPatch, patch
from ..distributed import ALONE, World
from ..encoded_examples import EncodedExamples
from ..objective import Objective
from .collate import Assembly
from .cuda_graphs import CapturedPasses, check_capturable
from .extent import CACHE_BYTES, SPILL_BYTES, Extent, RowStore, extent_of
from .forward_backward import Passes
from .gradient_check import Trial
from .microbatches import Arrangement, Item, Share, Unit, may_pack, tokens
from .reference_cache import FrozenSide
from .token_budget import SHARE_OF_FREE, KeptBytes, free_bytes, tokens_that_fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Way:
    """What a step leaves out."""

    name: str
    prefix: bool  # tokens before the first steered one, and what prompts have in common
    partial: bool  # layers below the lowest steered one, the head's logits of all but the last token


#: From the fastest to the plain one; the first that agrees with the whole model is taken.
_WAYS = (
    _Way("with all shortcuts", True, True),
    _Way("with whole prompts", False, True),
    _Way("with the whole model in every step", False, False),
)

#: Prompts that show whether a model takes several in a row.
_PROBED = 3


class Engine:
    """Terms and gradients of an intervention on a frozen model; a context manager.

    Args:
        model: a causal language model, plain or compiled; frozen and in evaluation mode while the engine is open.
        data: its examples, encoded.
        intervention: a single one, or a stack for several fits at once.
        objectives: those that the shares will have.
        cache_bytes: of the model's device for what is constant.
        spill_bytes: of CPU memory for what is over.
        memory_bytes: for the activations of a pass; None: half of what is free when the engine opens. Passes have as
            many tokens as fit; on a CPU no more than are faster together.
        accumulate: passes that a step is split into, at least.
        capture: run passes as CUDA graphs.
        world: the processes that share each step's rows.

    Raises:
        ValueError: capture of a model that is not on one GPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        data: EncodedExamples,
        intervention: Intervention,
        objectives: Iterable[Objective],
        *,
        cache_bytes: int = CACHE_BYTES,
        spill_bytes: int = SPILL_BYTES,
        memory_bytes: int | None = None,
        accumulate: int = 1,
        capture: bool = False,
        world: World = ALONE,
    ) -> None:
        self.objectives = list(objectives)
        of_scalars = [objective.sparsity == "scalars" for objective in self.objectives]
        if any(of_scalars) and not isinstance(intervention, DynScalar):
            name = type(intervention).__name__
            raise ValueError(f"objective: sparsity='scalars' is of a DynScalar, which produces them; got a {name}")
        #: Whether rows have to stand for one prompt each, from the first layer on.
        self.notes_rows = any(of_scalars)
        if capture:
            check_capturable(model)
        refuse_sharded(model)
        self.model, self.data, self.intervention, self.world, self.capture = model, data, intervention, world, capture
        self.found = layout(model, intervention.paths)
        self.parameters = [value for value in intervention.parameters() if value.requires_grad]
        self.on_cpu = data.device.type == "cpu"
        self.budgets, self.memory_bytes, self.accumulate = (cache_bytes, spill_bytes), memory_bytes, accumulate
        self.halved = False
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        problems: list[str] = []
        trial = self._plain()
        for way in _WAYS:
            try:
                problem = self._open_by(way, trial)
            except Exception as error:
                self._open.close()
                if way is _WAYS[-1] or out_of_memory(error) or not self._fails_again(way, trial):
                    raise
                problem = f"{type(error).__name__}: {error}"
            if problem is None:
                break
            self._open.close()
            problems.append(f"{way.name}: {problem}")
        else:
            raise RuntimeError(
                f"model: steps of {type(self.found.model).__name__} do not give what its forward pass gives: "
                f"{'; '.join(problems)}"
            )
        if problems:
            warnings.warn(
                f"{type(self.found.model).__name__}: {'; '.join(problems)}; going on {way.name}, which takes longer",
                stacklevel=3,
            )
        return self

    def _fails_again(self, way: _Way, trial: Trial | None) -> bool:
        """Whether opening the model this way fails once more: an error that does not is not the way's."""
        try:
            self._open_by(way, trial)
        except Exception:
            return True
        else:
            return False
        finally:
            self._open.close()

    def _plain(self) -> Trial | None:
        """What the plain whole model says of two prompts; None where nothing is checked."""
        if skipped():
            return None
        with frozen(self.model), self._patched() as patched:
            group = None if self.intervention.n_groups is None else 0
            trial = Trial(self.found.model, self.data, self.intervention, patched, group, self.objectives[0])
            trial.check_gradient()
        return trial

    def _patched(self) -> AnyPatch:
        grouped = self.intervention.n_groups is not None
        return patch(
            self.model, self.intervention, group=torch.zeros(0, dtype=torch.int64, device="cpu") if grouped else None
        )

    def _open_by(self, way: _Way, trial: Trial | None) -> str | None:
        """Open the model; what shows that this way does not give what the plain whole model gives, or None."""
        extent = extent_of(self.intervention, self.data)
        first = extent.first if way.partial else 0
        self.extent = extent if way.prefix else Extent(first, extent.longest, extent.longest)
        self.data.alike_only = not way.partial
        self.way = way
        self.arrangement = Arrangement(self.data, self.extent, self.found.hidden_size, self.on_cpu, self.accumulate)
        self.store = RowStore(len(self.data), *self.budgets)
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self.data, "alike_only", False)
            stack.enter_context(frozen(self.model))
            arguments = forward_arguments(self.model, self.data.batch([0]))
            self.head, section = stack.enter_context(
                opened(self.found, self.model, arguments, shortcuts=way.partial)
            )  # fmt: skip
            if not section.partial and way.partial:
                self.extent = Extent(0, self.extent.width, self.extent.longest)
                self.arrangement.extent = self.extent
            self.partial = section.partial
            patched = self._patched()
            stack.callback(patched.remove)
            side = FrozenSide(
                self.model, self.found, self.data, self.extent, section, patched, self.head, self.store
            )  # fmt: skip
            self.assembly = Assembly(self.data, side, self.intervention.n_groups is not None, self.capture)
            self.passes = Passes(self.model, section, patched, self.head, self.found.n_layers, self.parameters)
            self.compute = CapturedPasses(self.passes).compute if self.capture else self.passes.compute
            options = {(objective.exclude_answers, objective.kl) for objective in self.objectives}
            output = side.prepare(sorted(options))
            # Another patch may tell rows and positions apart; a compiled model would be compiled for every width.
            if way.prefix and self.model is self.found.model and patched.alone:
                self.arrangement.packs = self._packing_agrees(side, output)
            self._bound_passes()
            problem = None if trial is None else self._disagreement(trial)
            self._open = stack.pop_all()
        return problem

    def _disagreement(self, trial: Trial) -> str | None:
        """What shows that the engine does not give what the plain whole model gives, or None."""
        shares = [Share(trial.rows, trial.objective)]
        items = [Item(0, row) for row in trial.rows]
        return trial.disagrees(lambda: self._sums(self.arrangement.passes(items, shares), shares))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def gradients(self, shares: Sequence[Share]) -> tuple[Tensor, list[Tensor]]:
        """The terms and gradients of E + λ_F·F.

        Returns:
            Effectiveness, faithfulness (means over a share's prompts, sums over its directions) and the ℓ1 norm of the
            produced scalars where it is penalised (a mean over both, else 0), [shares, 3]; and the gradient of each
            parameter. Nothing here waits for a GPU but the choice of rows.
        """
        items = self.world.part([Item(index, row) for index, share in enumerate(shares) for row in share.rows])
        while True:
            passes = self.arrangement.passes(items, shares)
            try:
                terms, gradients = self._sums(passes, shares)
                break
            except (torch.OutOfMemoryError, RuntimeError) as error:
                divisible = any(len(part) > 1 or len(part[0].items) > 1 for part in passes)
                if not out_of_memory(error) or self.halved or not divisible:
                    raise
            self.halved = True  # once
            largest = self.arrangement.halve(passes, shares)
            warnings.warn(
                f"out of memory with {largest} tokens in a pass; going on with at most {self.arrangement.max_tokens}",
                stacklevel=3,
            )
        self.world.sum_([terms, *gradients])
        return terms, gradients

    def _sums(self, passes: list[list[Unit]], shares: Sequence[Share]) -> tuple[Tensor, list[Tensor]]:
        terms = torch.zeros(len(shares), 3, dtype=torch.float32, device=self.intervention.device)
        gradients = [torch.zeros_like(value) for value in self.parameters]
        quiet_below = self._quiet_below(shares)
        for part in passes:
            found = self.compute(self.assembly.inputs(part, shares, quiet_below))
            for total, added in zip([terms, *gradients], found, strict=True):
                total += added.to(total.device)
        if self.notes_rows:  # a mean over directions, as the norm of parameters has one value for both
            for index, share in enumerate(shares):
                terms[index, 2] /= len(share.objective.directions)
        return terms, gradients

    def _quiet_below(self, shares: Sequence[Share]) -> int:
        """The layers below it give all directions the same; n_layers + 1: all of the model does.

        It reads the parameters, which on a GPU would wait for the step before: there nothing is taken for quiet.
        """
        if (
            not self.partial
            or not self.on_cpu
            or self.notes_rows
            or all(len(share.objective.directions) == 1 for share in shares)
        ):
            return 0
        groups = sorted({share.group for share in shares})
        starts = [self.found.n_layers + 1]
        for single in self.intervention.singles:
            location = single.location
            steered = torch.zeros(len(location.layers), dtype=torch.bool, device="cpu")
            for value in single.parameters():  # also those that are not learned
                values = value.detach()
                values = values[None] if single.n_groups is None else values[groups]
                steered |= values.flatten(2).ne(0).any(-1).any(0).cpu()
            starts += [location.first_changed(location.layers[index]) for index in steered.nonzero().flatten().tolist()]
        return min(starts)

    def _packing_agrees(self, side: FrozenSide, output: Tensor) -> bool:
        """Whether prompts may be packed: every token is steered alike, and the frozen model says the same.

        Not on a GPU: a mask of one's own costs the fast kernels of attention there (not measured).
        """
        if (
            not self.on_cpu
            or self.notes_rows
            or self.head is None
            or self.found.model_type not in FAMILIES  # another one may not take such a mask
            or self.arrangement.accumulate > 1
            or any(single.location.positions is not None for single in self.intervention.singles)
            or "position_ids" not in accepted_arguments(self.model)
            or not may_pack(self.model.config.get_text_config(), self.extent.longest)
        ):
            return False
        different = {tuple(prompt): row for row, prompt in enumerate(self.data.prompts)}
        if len(different) < 2:
            return False
        shortest = sorted(different, key=len)[:_PROBED]
        (unit,) = self.arrangement.packed([Item(0, different[prompt]) for prompt in shortest], sum(map(len, shortest)))
        assert unit.tree is not None
        columns = [path[-1] for path in unit.tree.paths]
        expected = output[[item.row for item in unit.items]]
        return side.says_the_same(self.assembly.packed_tokens([unit]), columns, expected)

    def _bound_passes(self) -> None:
        """Count what one prompt keeps for its backward, and bound the tokens of a pass by it."""
        row = max(range(len(self.data)), key=lambda row: len(self.data.prompts[row]))
        units, shares = [self.arrangement.single(Item(0, row))], [Share([row], self.objectives[0])]
        with torch.enable_grad(), KeptBytes([self.found.model]) as kept:
            self.passes.losses(self.assembly.inputs(units, shares, 0))
        budget = self.memory_bytes
        if budget is None:
            budget = int(SHARE_OF_FREE * free_bytes(self.data.device))
        fit = tokens_that_fit(kept.n_bytes, tokens(units, shares), budget)
        fit = 1 << (fit.bit_length() - 1)  # a power of two: a little more or less free memory changes no pass
        bound = self.arrangement.max_tokens
        self.arrangement.max_tokens = fit if bound is None else min(fit, bound)


def refuse_sharded(model: nn.Module) -> None:
    """ValueError where a model's weights are spread over processes: steps of one process would not fit the others'."""
    name = next((name for name, value in model.named_parameters() if type(value).__name__ == "DTensor"), None)
    if name is not None:
        raise ValueError(
            f"model: {name} is sharded over processes (tensor parallelism or FSDP2), and learning needs whole weights "
            "in each process; patch, generate and evaluate take such a model"
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
