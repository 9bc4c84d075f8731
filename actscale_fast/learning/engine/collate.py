"""A microbatch as tensors: everything that depends on values is decided here, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import ops
from ..encoded_examples import EncodedExamples
from ..objective import LossOptions
from .cuda_graphs import WIDTHS
from .forward_backward import MicrobatchInputs, MicrobatchShape
from .microbatches import FitRequest, PackedRow, RequestedPrompt
from .packing import additive
from .reference_cache import ReferenceCache


@dataclass(frozen=True, slots=True)
class Loss:
    """A prompt under one direction."""

    batch_row: int
    prompt: RequestedPrompt
    column: int  # of the prompt's last token


class Collator:
    """Makes the tensors of microbatches.

    Args:
        data: the examples.
        cache: what is constant for them.
        grouped: whether the intervention is a stack.
        capture: pad prompts to few widths.
    """

    def __init__(self, data: EncodedExamples, cache: ReferenceCache, grouped: bool, capture: bool) -> None:
        self.data, self.cache, self.grouped = data, cache, grouped
        self.multiple = WIDTHS if capture and data.pads else 1
        self.answers = {"correct": data.correct.cpu(), "wrong": data.wrong.cpu()}

    def collate(
        self, rows: Sequence[PackedRow], requests: Sequence[FitRequest], shared_below: int = 0
    ) -> MicrobatchInputs:
        """The inputs of one microbatch, whose rows are either all packed or all single prompts.

        Args:
            rows: the packed rows.
            requests: the requests of the step.
            shared_below: as in `MicrobatchShape`.
        """
        self.cache.begin(prompt.row for row in rows for prompt in row.prompts)
        packed = rows[0].tree is not None
        directions = [row.directions(requests) for row in rows]
        # All rows under their first direction, then all under their second.
        batch_rows = [
            (index, float(signs[number]))
            for number in range(max(map(len, directions)))
            for index, signs in enumerate(directions)
            if number < len(signs)
        ]
        losses = [
            Loss(batch_row, prompt, tree.paths[place][-1] if (tree := rows[index].tree) else -1)
            for batch_row, (index, _) in enumerate(batch_rows)
            for place, prompt in enumerate(rows[index].prompts)
        ]
        small = {
            "expand": ints([index for index, _ in batch_rows]),
            "sign": floats([sign for _, sign in batch_rows]),
            **loss_weights(losses, requests),
        }
        if packed:
            small["row_of"] = ints([loss.batch_row for loss in losses])
            small["column_of"] = ints([loss.column for loss in losses])
        if self.grouped:
            small["groups"] = ints([requests[row.prompts[0].request].group for row in rows])
        kinds: dict[LossOptions, list[int]] = {}
        for place, loss in enumerate(losses):
            kinds.setdefault(requests[loss.prompt.request].objective.loss_options, []).append(place)
        references: list[ops.ReferenceStatistics | Tensor] = []
        for number, (options, places) in enumerate(kinds.items()):
            examples = ints([losses[place].prompt.row for place in places])
            for name, ids in self.answers.items():
                small[f"{name}.{number}"] = ids[examples]
            if len(kinds) > 1:
                small[f"places.{number}"] = ints(places)
            references.append(self.cache.reference(examples, options.kl))
        tensors = {name: value.to(self.data.device, non_blocking=True) for name, value in small.items()}
        region = self.cache.region
        if packed:
            tensors |= self.packed_tokens(rows)
            width, padded = max(row.width for row in rows), False
        else:
            examples_of = [row.prompts[0].row for row in rows]
            batch = self.data.batch(examples_of, self.multiple)
            tensors |= {"ids": batch.input_ids, "mask": batch.attention_mask}
            tensors |= self.cache.constants(examples_of, batch.input_ids.shape[1])
            width, padded = min(region.width, batch.input_ids.shape[1]), batch.padded
        regular = len({len(signs) for signs in directions}) == 1
        shape = MicrobatchShape(width, padded, packed, region.first_layer, regular, shared_below, tuple(kinds))
        return MicrobatchInputs(shape, tensors, tuple(references))

    def packed_tokens(self, rows: Sequence[PackedRow]) -> dict[str, Tensor]:
        """Ids, positions, mask and constant hidden states of packed rows, left-aligned.

        There are no constant hidden states where a prompt runs with answers of several tokens.
        """
        examples = [prompt.row for row in rows for prompt in row.prompts]
        answered = any(example in self.data.long_answers for example in examples)
        width = max(row.width for row in rows)
        ids = torch.full((len(rows), width), self.data.pad_id, device="cpu")
        positions = torch.zeros(len(rows), width, dtype=torch.int64, device="cpu")
        mask = torch.empty(len(rows), 1, width, width, dtype=torch.bool, device="cpu")
        # Where the hidden state of each token is kept: with which prompt, and at which position from its end.
        prompt_of, from_end = torch.zeros_like(positions), torch.full_like(positions, -1)
        before = 0
        for index, row in enumerate(rows):
            assert row.tree is not None
            ids[index, : row.width] = ints(row.tree.tokens)
            positions[index, : row.width] = ints(row.tree.depths)
            mask[index, 0] = row.tree.allowed(width)
            if answered:
                continue
            places, depths = zip(*row.tree.sources, strict=True)
            prompt_of[index, : row.width] = before + ints(places)
            lengths = [len(self.data.prompts[examples[before + place]]) for place in places]
            from_end[index, : row.width] = ints(depths) - ints(lengths)
            before += len(row.prompts)
        device = self.data.device
        tensors = {
            "ids": ids.to(device),
            "positions": positions.to(device),
            "mask": additive(mask, self.cache.dtype).to(device),
        }
        hidden = None if answered else self.cache.hidden(examples)
        if hidden is not None:
            tensors["hidden"] = hidden[prompt_of.to(hidden.device), from_end.to(hidden.device)]
        return tensors


def loss_weights(losses: Sequence[Loss], requests: Sequence[FitRequest]) -> dict[str, Tensor]:
    """ "mean" [S, R], "weight" and "sparsity" [R] of `MicrobatchInputs`."""
    mean = torch.zeros(len(requests), len(losses), dtype=torch.float32, device="cpu")
    for place, loss in enumerate(losses):
        mean[loss.prompt.request, place] = 1 / len(requests[loss.prompt.request].rows)
    objectives = [request.objective for request in requests]
    weights = {"mean": mean, "weight": floats([objective.faithfulness for objective in objectives]) @ mean}
    penalised = [objective.sparsity == "scalars" for objective in objectives]
    if any(penalised):
        per_direction = [
            objective.minimality_weight / len(objective.directions) * one
            for objective, one in zip(objectives, penalised, strict=True)
        ]
        weights["sparsity"] = floats(per_direction) @ mean
    return weights


def ints(values: Sequence[int]) -> Tensor:
    """On the CPU, whatever PyTorch's default device is."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def floats(values: Sequence[float]) -> Tensor:
    """In float32 on the CPU, whatever PyTorch's defaults are."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")
