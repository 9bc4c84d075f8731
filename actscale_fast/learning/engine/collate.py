"""A pass as tensors: what of it depends on values is decided here, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import ops
from ..encoded_examples import EncodedExamples
from .cuda_graphs import WIDTHS
from .forward_backward import Inputs, LossOptions, Shape
from .microbatches import Item, Share, Unit
from .packing import additive
from .reference_cache import FrozenSide


@dataclass(frozen=True, slots=True)
class _Loss:
    """A prompt under one direction."""

    row: int  # of the pass
    item: Item
    column: int  # of the prompt's last token


class Assembly:
    """Writes passes down as tensors.

    Args:
        data: the examples.
        frozen_side: what is constant of them.
        grouped: whether the intervention is a stack.
        capture: pad prompts to few widths.
    """

    def __init__(self, data: EncodedExamples, frozen_side: FrozenSide, grouped: bool, capture: bool) -> None:
        self.data, self.frozen_side, self.grouped = data, frozen_side, grouped
        self.multiple = WIDTHS if capture and data.pads else 1
        self.answers = {"correct": data.correct.cpu(), "wrong": data.wrong.cpu()}

    def inputs(self, part: Sequence[Unit], shares: Sequence[Share], quiet_below: int) -> Inputs:
        """One pass of units that are all packed, or all single prompts.

        Args:
            part: the units.
            shares: of the step.
            quiet_below: as `Shape` has it.
        """
        packed = part[0].tree is not None
        unit_of, signs = [], []  # of each row; all units under their first direction, then under their second
        directions = [unit.directions(shares) for unit in part]
        for number in range(max(map(len, directions))):
            for index, signs_of in enumerate(directions):
                if number < len(signs_of):
                    unit_of.append(index)
                    signs.append(float(signs_of[number]))
        losses = [
            _Loss(row, item, tree.paths[place][-1] if (tree := part[index].tree) else -1)
            for row, index in enumerate(unit_of)
            for place, item in enumerate(part[index].items)
        ]
        small = {"expand": _ints(unit_of), "sign": _floats(signs), **_weights(losses, shares)}
        if packed:
            small["row_of"] = _ints([loss.row for loss in losses])
            small["column_of"] = _ints([loss.column for loss in losses])
        if self.grouped:
            small["groups"] = _ints([shares[unit.items[0].share].group for unit in part])
        kinds: dict[LossOptions, list[int]] = {}
        for place, loss in enumerate(losses):
            objective = shares[loss.item.share].objective
            kinds.setdefault((objective.margin, objective.exclude_answers, objective.kl), []).append(place)
        references: list[ops.ReferenceStatistics | Tensor] = []
        for number, ((_, exclude, kl), places) in enumerate(kinds.items()):
            examples = _ints([losses[place].item.row for place in places])
            for name, ids in self.answers.items():
                small[f"{name}.{number}"] = ids[examples]
            if len(kinds) > 1:
                small[f"places.{number}"] = _ints(places)
            references.append(self.frozen_side.reference(examples, exclude, kl))
        tensors = {name: value.to(self.data.device, non_blocking=True) for name, value in small.items()}
        extent = self.frozen_side.extent
        if packed:
            tensors |= self.packed_tokens(part)
            width, padded = max(unit.width for unit in part), False
        else:
            rows = [unit.items[0].row for unit in part]
            batch = self.data.batch(rows, self.multiple)
            tensors |= {"ids": batch.input_ids, "mask": batch.attention_mask}
            tensors |= self.frozen_side.constants(rows, batch.input_ids.shape[1])
            width, padded = min(extent.width, batch.input_ids.shape[1]), batch.padded
        regular = len({len(signs_of) for signs_of in directions}) == 1
        shape = Shape(width, padded, packed, extent.first, regular, quiet_below, tuple(kinds))
        return Inputs(shape, tensors, tuple(references))

    def packed_tokens(self, part: Sequence[Unit]) -> dict[str, Tensor]:
        """Ids, positions, mask and constant hidden states of packed units, left-aligned."""
        rows = [item.row for unit in part for item in unit.items]
        width = max(unit.width for unit in part)
        ids = torch.full((len(part), width), self.data.pad_id, device="cpu")
        positions = torch.zeros(len(part), width, dtype=torch.int64, device="cpu")
        mask = torch.empty(len(part), 1, width, width, dtype=torch.bool, device="cpu")
        item_of = torch.zeros(
            len(part), width, dtype=torch.int64, device="cpu"
        )  # where each token's hidden state is kept
        from_end = torch.full_like(item_of, -1)
        before = 0
        for index, unit in enumerate(part):
            assert unit.tree is not None
            ids[index, : unit.width] = _ints(unit.tree.tokens)
            positions[index, : unit.width] = _ints(unit.tree.depths)
            mask[index, 0] = unit.tree.allowed(width)
            places, depths = zip(*unit.tree.sources, strict=True)
            item_of[index, : unit.width] = before + _ints(places)
            lengths = [len(self.data.prompts[rows[before + place]]) for place in places]
            from_end[index, : unit.width] = _ints(depths) - _ints(lengths)
            before += len(unit.items)
        device = self.data.device
        tensors = {
            "ids": ids.to(device),
            "positions": positions.to(device),
            "mask": additive(mask, self.frozen_side.dtype).to(device),
        }
        hidden = self.frozen_side.hidden(rows)
        if hidden is not None:
            tensors["hidden"] = hidden[item_of.to(hidden.device), from_end.to(hidden.device)]
        return tensors


def _weights(losses: Sequence[_Loss], shares: Sequence[Share]) -> dict[str, Tensor]:
    """ "mean" [S, R], "weight" and "sparsity" [R] of `Inputs`."""
    mean = torch.zeros(len(shares), len(losses), dtype=torch.float32, device="cpu")
    for place, loss in enumerate(losses):
        mean[loss.item.share, place] = 1 / len(shares[loss.item.share].rows)
    faithfulness = _floats([share.objective.faithfulness for share in shares])
    weights = {"mean": mean, "weight": faithfulness @ mean}
    if any(share.objective.sparsity == "scalars" for share in shares):
        sparse = [
            share.objective.minimality / len(share.objective.directions) * (share.objective.sparsity == "scalars")
            for share in shares
        ]
        weights["sparsity"] = _floats(sparse) @ mean
    return weights


def _ints(values: Sequence[int]) -> Tensor:
    """On the CPU, whatever PyTorch's default device is."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _floats(values: Sequence[float]) -> Tensor:
    """In float32 on the CPU, whatever PyTorch's defaults are."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")
