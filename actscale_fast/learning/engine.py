"""One step of one fit or of many: the three terms and their gradients, at the cost of what an intervention can change.

A step runs rows: every prompt of every fit under each of its directions. What the interventions cannot reach is
constant and comes from a store (`constants`); the rest runs as a section of the model, in passes of prompts of similar
length (`planning`, `passes`). The last hidden states go to the fused losses, never as logits where the head allows it.
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
from ..models import OutputHead, Patch, Section, fast_products, keys_and_values, layout, patch, read_head
from .capture import WIDTHS, CapturedPasses, check_capturable
from .constants import CACHE_BYTES, SPILL_BYTES, Extent, RowStore, right_aligned
from .encoding import Batch, EncodedExamples, accepted_arguments, forward_arguments
from .memory import SHARE_OF_FREE, KeptBytes, free_bytes, tokens_that_fit
from .modes import frozen
from .objective import Objective
from .packing import COLUMNS, Tree, additive, rows_of, tree_of
from .parallel import ALONE, World
from .passes import Inputs, LossOptions, Passes, Shape
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
class Item:
    """One prompt of one share."""

    share: int
    row: int


@dataclass(frozen=True, slots=True)
class Unit:
    """What stands in one row of a pass: a prompt, or several of one share as the paths of a tree."""

    items: tuple[Item, ...]
    width: int  # columns that run
    tree: Tree | None = None


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
        self.model, self.data, self.intervention = model, data, intervention
        self.found = layout(model, intervention.location.paths)
        self.extent = extent_of(intervention, data)
        self.parameters = [value for value in intervention.parameters() if value.requires_grad]
        self.objectives = list(objectives)
        self.options = sorted({_loss_options(objective) for objective in self.objectives})
        self.on_cpu = data.device.type == "cpu"
        self.memory_bytes = memory_bytes
        self.max_tokens: int | None = PASS_TOKENS_CPU if self.on_cpu else None
        self.accumulate, self.world, self.capture = accumulate, world, capture
        if capture:
            check_capturable(model)
        self.halved = False
        self.packs = False  # until the model has shown that it allows it
        self.output_device = data.device  # of the head's inputs, or of the logits
        self.answers = {"correct": data.correct.cpu(), "wrong": data.wrong.cpu()}
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
            self.passes = Passes(
                self.model, self.section, self.patched, self.head, self.found.n_layers, self.parameters
            )
            self._prepare()
            self._bound_passes()
            self.compute = CapturedPasses(self.passes).compute if self.capture else self.passes.compute
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
        items = self.world.part([Item(index, row) for index, share in enumerate(shares) for row in share.rows])
        while True:
            passes = self.plan(items, shares)
            try:
                terms, gradients = self._sums(passes, shares)
                break
            except (torch.OutOfMemoryError, RuntimeError) as error:
                divisible = any(len(part) > 1 or len(part[0].items) > 1 for part in passes)
                if not out_of_memory(error) or self.halved or not divisible:
                    raise
                self._halve(passes, shares)
        self.world.sum_([terms, *gradients])
        return terms, gradients

    def _sums(self, passes: list[list[Unit]], shares: Sequence[Share]) -> tuple[Tensor, list[Tensor]]:
        terms = torch.zeros(len(shares), 2, device=self.intervention.device)
        gradients = [torch.zeros_like(value) for value in self.parameters]
        quiet_below = self._quiet_below(shares)
        for part in passes:
            found = self.compute(self.inputs(part, shares, quiet_below))
            for total, added in zip([terms, *gradients], found, strict=True):
                total += added.to(total.device)
        return terms, gradients

    def _halve(self, passes: list[list[Unit]], shares: Sequence[Share]) -> None:
        """Bound all further passes by half of the largest one; once, and said aloud."""
        self.halved = True
        sizes = [self._tokens(part, shares) for part in passes]
        self.max_tokens = max(max(sizes) // 2, 1)
        warnings.warn(
            f"out of memory with {max(sizes)} tokens in a pass; going on with at most {self.max_tokens}",
            stacklevel=4,
        )

    def _tokens(self, part: Sequence[Unit], shares: Sequence[Share]) -> int:
        """Tokens of one pass, padding included."""
        return max(unit.width for unit in part) * sum(self._n_directions(unit, shares) for unit in part)

    def _n_directions(self, unit: Unit, shares: Sequence[Share]) -> int:
        return len(shares[unit.items[0].share].objective.directions)

    def plan(self, items: Sequence[Item], shares: Sequence[Share]) -> list[list[Unit]]:
        """The passes of a step: the cheapest of its prompts one by one, and packed to several widths."""
        if not items:
            return []
        weight = max(len(share.objective.directions) for share in shares)
        single = [Unit((item,), min(len(self.data.prompts[item.row]), self.extent.width)) for item in items]
        max_tokens = self.max_tokens
        if self.accumulate > 1:
            least = -(-len(items) // self.accumulate) * weight * max(unit.width for unit in single)
            max_tokens = least if max_tokens is None else min(max_tokens, least)
        arrangements = [single]
        if self.packs:
            arrangements += [
                self._packed(items, columns)
                for columns in COLUMNS
                if max_tokens is None or weight * columns <= max_tokens
            ]
        pass_cost = PASS_COST_CPU if self.on_cpu else PASS_COST_GPU
        best: tuple[float, list[list[Unit]]] | None = None
        for units in arrangements:
            places = plan(
                [unit.width for unit in units], weight=weight, pass_cost=pass_cost, max_tokens=max_tokens,
                at_least=self.accumulate,
            )  # fmt: skip
            passes = [[units[place] for place in sorted(some)] for some in places]
            cost = sum(self._cost(part, weight) + pass_cost for part in passes)
            if best is None or cost < best[0]:
                best = cost, passes
        assert best is not None
        return best[1]

    def _cost(self, part: Sequence[Unit], weight: int) -> float:
        """Of a pass, in tokens: attention adds a share that grows with the columns, by operations width/(6·d) of the
        linear layers' and some three times that in time."""
        width = max(unit.width for unit in part)
        return len(part) * weight * width * (1 + width / (2 * self.found.hidden_size))

    def _packed(self, items: Sequence[Item], columns: int) -> list[Unit]:
        """The prompts of each share in rows of about that many columns."""
        of_share: dict[int, list[Item]] = {}
        for item in items:
            of_share.setdefault(item.share, []).append(item)
        units = []
        for mine in of_share.values():
            for places in rows_of([self.data.prompts[item.row] for item in mine], columns):
                tree = tree_of([self.data.prompts[mine[place].row] for place in places])
                units.append(Unit(tuple(mine[place] for place in places), tree.width, tree))
        return units

    def inputs(self, part: Sequence[Unit], shares: Sequence[Share], quiet_below: int) -> Inputs:
        """One pass as tensors on the device."""
        packed = part[0].tree is not None
        unit_of, signs = [], []  # of each row; all units under their first direction, then under their second
        n_directions = [self._n_directions(unit, shares) for unit in part]
        for number in range(max(n_directions)):
            for index, unit in enumerate(part):
                if number < n_directions[index]:
                    unit_of.append(index)
                    signs.append(float(shares[unit.items[0].share].objective.directions[number]))
        items = [item for unit in part for item in unit.items]
        # A loss is of an item under one direction: its row, and the column of its last token.
        losses = [
            (row, part[index].items[place], tree.paths[place][-1] if (tree := part[index].tree) else -1)
            for row, index in enumerate(unit_of)
            for place in range(len(part[index].items))
        ]
        mean = torch.zeros(len(shares), len(losses))
        for place, (_, item, _) in enumerate(losses):
            mean[item.share, place] = 1 / len(shares[item.share].rows)
        faithfulness = torch.tensor([share.objective.faithfulness for share in shares])
        small = {
            "expand": torch.tensor(unit_of),
            "sign": torch.tensor(signs),
            "mean": mean,
            "weight": faithfulness @ mean,
        }
        if packed:
            small["row_of"] = torch.tensor([row for row, _, _ in losses])
            small["column_of"] = torch.tensor([column for _, _, column in losses])
        if self.intervention.n_groups is not None:
            small["groups"] = torch.tensor([shares[unit.items[0].share].group for unit in part])
        places: dict[LossOptions, list[int]] = {}
        for place, (_, item, _) in enumerate(losses):
            objective = shares[item.share].objective
            places.setdefault((objective.margin, *_loss_options(objective)), []).append(place)
        references = []
        for number, ((_, exclude, kl), mine) in enumerate(places.items()):
            examples = torch.tensor([losses[place][1].row for place in mine])
            for name, ids in self.answers.items():
                small[f"{name}.{number}"] = ids[examples]
            if len(places) > 1:
                small[f"places.{number}"] = torch.tensor(mine)
            known = self.reference if self.head is None else self.statistics[exclude, kl]
            assert known is not None
            references.append(known[examples.to(self.output_device)])
        rows = [item.row for item in items]
        if packed:
            tensors, width, padded = self._packed_tokens(part, rows), max(unit.width for unit in part), False
        else:
            batch = self.data.batch(rows, WIDTHS if self.capture else 1)
            tensors = {"ids": batch.input_ids, "mask": batch.attention_mask, **self._constants(rows, batch)}
            width, padded = min(self.extent.width, batch.input_ids.shape[1]), batch.padded
        device = self.data.device
        tensors |= {name: value.to(device, non_blocking=True) for name, value in small.items()}
        regular = len(set(n_directions)) == 1
        shape = Shape(width, padded, packed, self.extent.first, regular, quiet_below, tuple(places))
        return Inputs(shape, tensors, tuple(references))

    def _packed_tokens(self, part: Sequence[Unit], rows: list[int]) -> dict[str, Tensor]:
        """Ids, positions, mask and constant hidden states of packed units, left-aligned."""
        width = max(unit.width for unit in part)
        ids = torch.full((len(part), width), self.data.pad_id)
        positions = torch.zeros(len(part), width, dtype=torch.int64)
        mask = torch.empty(len(part), 1, width, width, dtype=torch.bool)
        item_of = torch.zeros(len(part), width, dtype=torch.int64)  # where each token's hidden state is kept
        column_of = torch.zeros_like(item_of)
        before = 0
        for index, unit in enumerate(part):
            assert unit.tree is not None
            ids[index, : unit.width] = torch.tensor(unit.tree.tokens)
            positions[index, : unit.width] = torch.tensor(unit.tree.depths)
            mask[index, 0] = unit.tree.allowed(width)
            for column, (place, position) in enumerate(unit.tree.sources):
                item_of[index, column] = before + place
                column_of[index, column] = position - len(self.data.prompts[rows[before + place]])  # from the end
            before += len(unit.items)
        device = self.data.device
        additive_mask = additive(mask, self._embedding.dtype)
        tensors = {"ids": ids.to(device), "positions": positions.to(device), "mask": additive_mask.to(device)}
        if self.extent.first:
            hidden = self.store.get(rows, lambda again: self._frozen(again)[1])["hidden"]
            tensors["hidden"] = hidden[item_of.to(hidden.device), column_of.to(hidden.device)]
        return tensors

    @property
    def _embedding(self) -> Tensor:
        return self.found.model.get_input_embeddings().weight  # type: ignore[operator, no-any-return]

    def _quiet_below(self, shares: Sequence[Share]) -> int:
        """The layers below it give all directions the same; n_layers + 1: all of the model does.

        It reads the parameters, which on a GPU would wait for the step before: there nothing is taken for quiet.
        """
        if not self.on_cpu or all(len(share.objective.directions) == 1 for share in shares):
            return 0
        location = self.intervention.location
        groups = sorted({share.group for share in shares})
        steered = torch.zeros(len(location.layers), dtype=torch.bool)
        for value in self.intervention.parameters():  # also those that are not learned
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
        self.output_device = outputs[0][1].device
        output = torch.cat([output for _, output in outputs])[order.to(self.output_device)]
        if self.head is None:
            self.reference = output
            return
        self.packs = self._packing_agrees(output)
        correct, wrong = (ids.to(output.device) for ids in (self.data.correct, self.data.wrong))
        for exclude, kl in self.options:
            self.statistics[exclude, kl] = ops.reference_statistics(
                output, self.head.weight, correct, wrong, exclude_answers=exclude, kl=kl,  # type: ignore[arg-type]
                **self.head.options,
            )  # fmt: skip

    def _packing_agrees(self, output: Tensor) -> bool:
        """Whether prompts may be packed: all tokens steered alike, on a CPU, and the frozen model says the same.

        On a GPU a mask in four dimensions costs the fast kernels of attention (not measured there).
        """
        if (
            not self.on_cpu
            or self.accumulate > 1
            or self.intervention.location.positions is not None
            or not self.patched.alone  # another one may tell rows and positions apart
            or self.model is not self.found.model  # compiled: every width would be compiled anew
            or len(self.data) < 2
            or "position_ids" not in accepted_arguments(self.model)
            or not may_pack(self.model.config.get_text_config(), self.extent.longest)
        ):
            return False
        items = [Item(0, row) for row in self.data.by_length(_REFERENCE_ROWS)[-1]]
        unit = max(self._packed(items, COLUMNS[0]), key=lambda unit: len(unit.items))
        assert unit.tree is not None
        rows = [item.row for item in unit.items]
        given = self._packed_tokens([unit], rows)
        arguments = {"input_ids": given["ids"], "attention_mask": given["mask"], "position_ids": given["positions"]}
        self.patched.paused = True
        try:
            found, _ = self.section.run(arguments | {"use_cache": False}, every_token=True)
        finally:
            self.patched.paused = False
        expected = output[rows]
        last = found[0, [path[-1] for path in unit.tree.paths]]
        # Half of the digits: another mask or another position is far beyond that, rounding far below. Some models
        # compute their attention in float32 whatever their dtype.
        digits = max(torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps)
        largest = digits**0.5 * expected.abs().amax()
        return bool((last - expected).abs().amax() <= largest)

    def _bound_passes(self) -> None:
        """Count what one prompt keeps for its backward, and bound the tokens of a pass by it."""
        row = max(range(len(self.data)), key=lambda row: len(self.data.prompts[row]))
        units = [Unit((Item(0, row),), min(len(self.data.prompts[row]), self.extent.width))]
        shares = [Share([row], self.objectives[0])]
        with torch.enable_grad(), KeptBytes([self.found.model]) as kept:
            self.passes.losses(self.inputs(units, shares, 0))
        budget = self.memory_bytes or int(SHARE_OF_FREE * free_bytes(self.data.device))
        fit = tokens_that_fit(kept.n_bytes, self._tokens(units, shares), budget)
        fit = 1 << (fit.bit_length() - 1)  # a power of two: a little more or less free memory changes no pass
        self.max_tokens = fit if self.max_tokens is None else min(fit, self.max_tokens)

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


def may_pack(config: Any, longest: int) -> bool:
    """Whether attention takes a mask of one's own, and no window counts columns instead of a prompt's tokens."""
    windows = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_window")]
    narrow = any(isinstance(window, int) and window < longest for window in windows)
    return config._attn_implementation in ("sdpa", "eager") and not narrow


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _loss_options(objective: Objective) -> tuple[bool, str]:
    return objective.exclude_answers, objective.kl


def _no_rows(intervention: Intervention) -> Tensor | None:
    return None if intervention.n_groups is None else torch.zeros(0, dtype=torch.int64)
