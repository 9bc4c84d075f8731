"""One step of one fit or of many: the three terms and their gradients, at the cost of what an intervention can change.

A step runs rows: every prompt of every fit under each of its directions. What the interventions cannot reach is
constant and comes from a store (`constants`); the rest runs as a section of the model, in passes of prompts of similar
length (`planning`). The last hidden states go to the fused losses, never as logits where the head allows it.

Layers below the lowest scalar that is not zero give both directions the same activations. They run once a prompt, and
since an edit of parameters that are 0 is linear in β, their gradient is that of Σ_s s·(upstream under β = s).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from .. import ops
from ..interventions import Intervention
from ..models import OutputHead, Patch, Prefix, Section, fast_products, keys_and_values, layout, patch, read_head
from .constants import CACHE_BYTES, SPILL_BYTES, Extent, RowStore, right_aligned
from .encoding import Batch, EncodedExamples, forward_arguments
from .modes import frozen
from .objective import Objective
from .parallel import ALONE, World
from .planning import PASS_COST_CPU, PASS_COST_GPU, PASS_TOKENS_CPU, plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Prompts in a pass of the frozen model.
_REFERENCE_ROWS = 32


@dataclass(frozen=True, slots=True)
class Share:
    """What one fit asks of a step."""

    rows: Sequence[int]  # of the examples
    objective: Objective
    group: int = 0  # of a stacked intervention


@dataclass(frozen=True, slots=True)
class _Item:
    """One prompt of one share."""

    share: int
    row: int


class Engine:
    """Terms and gradients of an intervention on a frozen model; a context manager.

    Args:
        model: a causal language model, plain or compiled; frozen and in evaluation mode while the engine is open.
        data: its examples, encoded.
        intervention: a single one, or a stack for several fits at once.
        objectives: those that the shares will have.
        cache_bytes: of the model's device for what is constant.
        spill_bytes: of CPU memory for what is over.
        max_tokens: in one pass; None: bounded on a CPU, where larger passes are not faster, not elsewhere.
        accumulate: passes that a step is split into, at least.
        world: the processes that share each step's rows.
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
        max_tokens: int | None = None,
        accumulate: int = 1,
        world: World = ALONE,
    ) -> None:
        self.model, self.data, self.intervention = model, data, intervention
        self.found = layout(model, intervention.location.paths)
        self.extent = extent_of(intervention, data)
        self.parameters = [value for value in intervention.parameters() if value.requires_grad]
        self.options = sorted({_loss_options(objective) for objective in objectives})
        self.on_cpu = data.device.type == "cpu"
        self.max_tokens = PASS_TOKENS_CPU if max_tokens is None and self.on_cpu else max_tokens
        self.accumulate, self.world = accumulate, world
        self.halved = False
        self.store = RowStore(len(data), cache_bytes, spill_bytes)
        self.statistics: dict[tuple[bool, str], Any] = {}
        self.reference: Tensor | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            probe = forward_arguments(self.model, self.data.batch([0]))
            self.head: OutputHead | None = read_head(self.found.model, probe)
            module = None if self.head is None else self.head.module
            if self.model is self.found.model:  # a compiled model brings kernels of its own
                stack.enter_context(fast_products(self.found.layers))
            self.section = stack.enter_context(Section(self.found, module, self.model))
            self.patched: Patch = stack.enter_context(
                patch(self.model, self.intervention, group=_no_rows(self.intervention))
            )
            self._prepare()
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def gradients(self, shares: Sequence[Share]) -> tuple[Tensor, list[Tensor]]:
        """The terms and gradients of E + λ_F·F.

        Returns:
            Effectiveness and faithfulness of each share (means over its prompts, sums over its directions) [shares, 2],
            and the gradient of each parameter; nothing here waits for a GPU but the choice of rows.
        """
        items = [_Item(index, row) for index, share in enumerate(shares) for row in share.rows]
        items = self.world.part(items)
        while True:
            passes = self.plan(items, shares)
            try:
                terms, gradients = self._sums(passes, shares)
                break
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error) or self.halved or max(map(len, passes)) == 1:
                    raise
                self._halve(passes, shares)
        self.world.sum_([terms, *gradients])
        return terms, gradients

    def _sums(self, passes: list[list[_Item]], shares: Sequence[Share]) -> tuple[Tensor, list[Tensor]]:
        terms = torch.zeros(len(shares), 2, device=self.intervention.device)
        gradients = [torch.zeros_like(value) for value in self.parameters]
        quiet_below = self._quiet_below(shares)
        for part in passes:
            losses, loss = self._losses(part, shares, quiet_below)
            for gradient, added in zip(gradients, torch.autograd.grad(loss, self.parameters), strict=True):
                gradient += added
            terms += losses.to(terms.device)
        return terms, gradients

    def _halve(self, passes: list[list[_Item]], shares: Sequence[Share]) -> None:
        """Bound all further passes by half of the largest one; once, and said aloud."""
        self.halved = True
        sizes = [self._tokens(part, shares) for part in passes]
        self.max_tokens = max(max(sizes) // 2, 1)
        warnings.warn(
            f"out of memory with {max(sizes)} tokens in a pass; going on with at most {self.max_tokens}",
            stacklevel=4,
        )

    def _tokens(self, part: list[_Item], shares: Sequence[Share]) -> int:
        """Tokens of one pass, padding included."""
        longest = max(min(len(self.data.prompts[item.row]), self.extent.width) for item in part)
        return longest * sum(len(shares[item.share].objective.directions) for item in part)

    def plan(self, items: Sequence[_Item], shares: Sequence[Share]) -> list[list[_Item]]:
        """The passes of a step."""
        lengths = [min(len(self.data.prompts[item.row]), self.extent.width) for item in items]
        weight = max(len(share.objective.directions) for share in shares)
        max_tokens = self.max_tokens
        if self.accumulate > 1:
            least = -(-len(items) // self.accumulate) * weight * max(lengths)
            max_tokens = least if max_tokens is None else min(max_tokens, least)
        cost = PASS_COST_CPU if self.on_cpu else PASS_COST_GPU
        passes = plan(lengths, weight=weight, pass_cost=cost, max_tokens=max_tokens)
        return [[items[place] for place in sorted(places)] for places in passes]

    def _losses(self, part: list[_Item], shares: Sequence[Share], quiet_below: int) -> tuple[Tensor, Tensor]:
        """(terms [shares, 2] without a graph, the loss) of one pass."""
        item_of, signs = [], []  # of each row
        for index, item in enumerate(part):
            for sign in shares[item.share].objective.directions:
                item_of.append(index)
                signs.append(float(sign))
        rows = [part[index].row for index in item_of]
        owners = [part[index].share for index in item_of]
        output = self._forward(part, item_of, signs, shares, quiet_below)
        direction = torch.tensor(signs, device=output.device)
        effectiveness, faithfulness = self._row_losses(output, rows, owners, direction, shares)
        # One column a share, with 1/n where the row is its own: sums of a share as one product, in a fixed order.
        mean = torch.zeros(len(shares), len(rows))
        for place, owner in enumerate(owners):
            mean[owner, place] = 1 / len(shares[owner].rows)
        weights = torch.tensor([share.objective.faithfulness for share in shares]) @ mean
        mean, weights, once = (t.to(output.device, effectiveness.dtype) for t in (mean, weights, mean.sum(0)))
        loss = (effectiveness * once).sum() + (faithfulness * weights).sum()
        terms = torch.stack([effectiveness.detach(), faithfulness.detach()], -1)  # [R, 2]
        own = mean > 0  # a row that is not finite concerns its own share alone
        kept = torch.where(own[..., None], mean[..., None] * terms, 0.0)
        return kept.sum(1).to(torch.float32), loss

    def _forward(
        self, part: list[_Item], item_of: list[int], signs: list[float], shares: Sequence[Share], quiet_below: int
    ) -> Tensor:
        """The head's inputs (or logits) of the rows of one pass."""
        rows = [item.row for item in part]
        batch = self.data.batch(rows)
        width = min(self.extent.width, batch.input_ids.shape[1])
        kept = self._constants(rows, batch)
        groups = [shares[item.share].group for item in part]
        expand = torch.tensor(item_of)
        sign = torch.tensor(signs)
        first, hidden = self.extent.first, kept.get("hidden")
        if quiet_below > first:
            end = None if quiet_below > self.found.n_layers else quiet_below
            self._rows(batch, 1.0, groups)
            hidden, _ = self._run(batch, width, kept, first=first, hidden=hidden, end=end)
            hidden = _SignedRows.apply(hidden, expand.to(hidden.device), sign.to(hidden.device))
            if end is None:
                return hidden
            first = quiet_below
        elif hidden is not None:
            hidden = hidden[expand.to(hidden.device)]
        rows_batch = batch.take(expand.to(batch.input_ids.device))
        kept = {name: value[expand.to(value.device)] for name, value in kept.items() if name != "hidden"}
        self._rows(rows_batch, sign, [groups[index] for index in item_of])
        return self._run(rows_batch, width, kept, first=first, hidden=hidden)[0]

    def _rows(self, batch: Batch, strength: float | Tensor, groups: list[int]) -> None:
        """Tell the patch what the rows of the next pass are."""
        self.patched.strength = strength
        self.patched.group = None if self.intervention.n_groups is None else torch.tensor(groups)

    def _run(
        self, batch: Batch, width: int, kept: dict[str, Tensor], *, first: int, hidden: Tensor | None,
        end: int | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
        n_columns = batch.input_ids.shape[1]
        prefix = None
        if width < n_columns:
            layers = [(kept[f"keys.{index}"], kept[f"values.{index}"]) for index in range(first, self.found.n_layers)]
            prefix = Prefix(first, layers, len(batch), n_columns - width, self.data.device)
        arguments = forward_arguments(self.model, batch, width)
        with self.patched.prompt(n_columns, batch.attention_mask if batch.padded else None):
            return self.section.run(arguments, first=first, end=end, hidden=hidden, prefix=prefix)

    def _row_losses(
        self, output: Tensor, rows: list[int], owners: list[int], direction: Tensor, shares: Sequence[Share]
    ) -> tuple[Tensor, Tensor]:
        """Effectiveness and faithfulness of each row [R]; one call of the op for all shares with the same options."""
        places: dict[tuple[Any, ...], list[int]] = {}
        for place, owner in enumerate(owners):
            objective = shares[owner].objective
            places.setdefault((objective.margin, *_loss_options(objective)), []).append(place)
        parts = []
        for (margin, exclude, kl), mine in places.items():
            whole = len(places) == 1
            chosen = torch.tensor(mine, device=output.device)
            examples = torch.tensor([rows[place] for place in mine], device=output.device)
            parts.append(
                self._losses_of(
                    output if whole else output[chosen], examples, direction if whole else direction[chosen],
                    margin, exclude, kl,
                )
            )  # fmt: skip
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([place for mine in places.values() for place in mine], device=output.device).argsort()
        effectiveness, faithfulness = (torch.cat(column)[order] for column in zip(*parts, strict=True))
        return effectiveness, faithfulness

    def _losses_of(
        self, output: Tensor, examples: Tensor, direction: Tensor, margin: float, exclude: bool, kl: Any
    ) -> tuple[Tensor, Tensor]:
        correct, wrong = (ids.to(output.device)[examples] for ids in (self.data.correct, self.data.wrong))
        if self.head is None:
            assert self.reference is not None
            effectiveness, faithfulness = ops.intervention_loss(
                output, self.reference[examples], correct, wrong, direction=direction, margin=margin,
                exclude_answers=exclude, kl=kl,
            )  # fmt: skip
        else:
            effectiveness, faithfulness = ops.linear_intervention_loss(
                output, self.head.weight, self.statistics[exclude, kl][examples], correct, wrong, direction=direction,
                margin=margin, exclude_answers=exclude, kl=kl, **self.head.options,
            )  # fmt: skip
        return effectiveness, faithfulness

    def _quiet_below(self, shares: Sequence[Share]) -> int:
        """The layers below it give all directions the same; n_layers + 1: all of the model does.

        It reads the parameters, which on a GPU would wait for the step before: there nothing is taken for quiet.
        """
        if not self.on_cpu or all(len(share.objective.directions) == 1 for share in shares):
            return 0
        location = self.intervention.location
        groups = sorted({share.group for share in shares})
        steered = torch.zeros(len(location.layers), dtype=torch.bool)
        for value in self.parameters:
            values = value.detach()
            values = values[None] if self.intervention.n_groups is None else values[groups]
            steered |= values.flatten(2).ne(0).any(-1).any(0).cpu()
        lowest = min((location.layers[index] for index in steered.nonzero().flatten().tolist()), default=None)
        return self.found.n_layers + 1 if lowest is None else lowest + (location.site == "residual")

    @torch.no_grad()
    def _prepare(self) -> None:
        """Run the frozen model over all examples: the losses' reference, and what is constant where it is kept."""
        outputs: list[tuple[list[int], Tensor]] = []
        for rows in self.data.by_length(_REFERENCE_ROWS):
            output, kept = self._frozen(rows)
            outputs.append((rows, output))
            if kept:
                self.store.put(rows, kept)
        order = torch.tensor([row for rows, _ in outputs for row in rows]).argsort()
        output = torch.cat([output for _, output in outputs])[order.to(outputs[0][1].device)]
        if self.head is None:
            self.reference = output
            return
        correct, wrong = (ids.to(output.device) for ids in (self.data.correct, self.data.wrong))
        for exclude, kl in self.options:
            self.statistics[exclude, kl] = ops.reference_statistics(
                output, self.head.weight, correct, wrong, exclude_answers=exclude, kl=kl,  # type: ignore[arg-type]
                **self.head.options,
            )  # fmt: skip

    @torch.no_grad()
    def _frozen(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """(the head's inputs or logits, what is constant of these rows) without the intervention."""
        from transformers import DynamicCache

        extent = self.extent
        batch = self.data.batch(rows)
        arguments = forward_arguments(self.model, batch)
        cache = DynamicCache() if extent.n_prefix else None
        if cache is not None:
            arguments |= {"past_key_values": cache, "use_cache": True}
        self.patched.paused = True
        try:
            output, noted = self.section.run(arguments, wanted=[extent.first] if extent.first else [])
        finally:
            self.patched.paused = False
        kept = {}
        if extent.first:
            kept["hidden"] = right_aligned(noted[extent.first], extent.width, 1)
        if cache is not None:
            columns = batch.input_ids.shape[1]
            for index in range(extent.first, self.found.n_layers):
                for name, value in zip(("keys", "values"), keys_and_values(cache, index), strict=True):
                    whole = right_aligned(value[:, :, :columns], extent.longest, 2)
                    kept[f"{name}.{index}"] = whole[:, :, : extent.n_prefix]
        return output, kept

    def _constants(self, rows: list[int], batch: Batch) -> dict[str, Tensor]:
        """What is constant of these rows, cut to the columns of the batch."""
        if self.extent.whole:
            return {}
        found = self.store.get(rows, lambda again: self._frozen(again)[1])
        columns = batch.input_ids.shape[1]
        n_prefix = max(columns - self.extent.width, 0)
        cut = {}
        for name, value in found.items():
            if name == "hidden":
                cut[name] = value[:, -min(columns, self.extent.width) :]
            elif n_prefix:
                cut[name] = value[:, :, -n_prefix:]
        return cut


class _SignedRows(torch.autograd.Function):
    """Rows of items that both directions share: row r is item `expand[r]`; the item's gradient is Σ_r sign[r]·dy[r]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expand: Tensor, sign: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(expand, sign)
        ctx.n_items = x.shape[0]
        return x[expand]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        expand, sign = ctx.saved_tensors
        signed = dy * sign.to(dy.dtype).view(-1, *[1] * (dy.dim() - 1))
        return dy.new_zeros(ctx.n_items, *dy.shape[1:]).index_add_(0, expand, signed), None, None


def extent_of(intervention: Intervention, data: EncodedExamples) -> Extent:
    """The part of the computation that the intervention can change on these examples."""
    location = intervention.location
    longest = max(map(len, data.prompts))
    first = min(location.layers) + (location.site == "residual")
    width = longest
    if location.positions is not None:
        reach = [_reach(len(prompt), location.positions) for prompt in data.prompts]
        width = max(reach)
    return Extent(first, width, longest)


def _reach(length: int, positions: Sequence[int]) -> int:
    """Tokens from the first steered one to the last of a prompt; 1 where none is steered."""
    from_end = [length - position if position >= 0 else -position for position in positions]
    return max((tokens for tokens in from_end if 0 < tokens <= length), default=1)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _loss_options(objective: Objective) -> tuple[bool, str]:
    return objective.exclude_answers, objective.kl


def _no_rows(intervention: Intervention) -> Tensor | None:
    return None if intervention.n_groups is None else torch.zeros(0, dtype=torch.int64)
