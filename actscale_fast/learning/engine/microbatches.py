"""From the prompts of a step to its microbatches: one prompt per row or several packed, whichever is cheapest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..encoded_examples import EncodedExamples
from ..objective import Objective
from .active_region import ActiveRegion
from .batch_plan import PASS_COST_CPU, PASS_COST_GPU, PASS_TOKENS_CPU, plan
from .packing import COLUMNS, Tree, rows_of, tree_of


@dataclass(frozen=True, slots=True)
class FitRequest:
    """What one fit asks of a step: the loss and gradient of some examples."""

    rows: Sequence[int]  # the examples
    objective: Objective
    group: int = 0  # the fit's group in a stacked intervention


@dataclass(frozen=True, slots=True)
class RequestedPrompt:
    """One prompt of one request."""

    request: int
    row: int


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One row of a microbatch: a prompt, or several prompts of one request as the paths of a tree.

    A prompt whose answers have several tokens takes two rows, one per answer, or two paths of a tree.
    """

    prompts: tuple[RequestedPrompt, ...]
    width: int  # number of columns that run
    tree: Tree | None = None
    n_rows: int = 1  # 2: one per answer

    def directions(self, requests: Sequence[FitRequest]) -> tuple[int, ...]:
        """The signs of the strengths that the row runs under."""
        return requests[self.prompts[0].request].objective.directions


class MicrobatchPlanner:
    """Splits the prompts of a step into microbatches.

    Args:
        data: the examples.
        region: the part of the prompts that runs.
        hidden_size: the model's hidden size.
        on_cpu: whether the model is on the CPU.
        accumulate: the least number of microbatches. If it is more than one, prompts are not packed.
    """

    def __init__(
        self, data: EncodedExamples, region: ActiveRegion, hidden_size: int, on_cpu: bool, accumulate: int
    ) -> None:
        self.data, self.region, self.hidden_size, self.accumulate = data, region, hidden_size, accumulate
        self.pass_cost = PASS_COST_CPU if on_cpu else PASS_COST_GPU
        #: The largest number of tokens in a microbatch; None: no bound.
        self.max_tokens: int | None = PASS_TOKENS_CPU if on_cpu else None
        #: Whether prompts may be packed.
        self.packs = False

    def microbatches(self, prompts: Sequence[RequestedPrompt], requests: Sequence[FitRequest]) -> list[list[PackedRow]]:
        """The cheapest microbatches of these prompts; those whose answers have several tokens get their own."""
        kinds: dict[int | None, list[RequestedPrompt]] = {}
        for prompt in prompts:
            kinds.setdefault(self.data.kind(prompt.row), []).append(prompt)
        return [microbatch for alike in kinds.values() for microbatch in self._cheapest(alike, requests)]

    def _cheapest(self, prompts: Sequence[RequestedPrompt], requests: Sequence[FitRequest]) -> list[list[PackedRow]]:
        """The cheapest microbatches of prompts of one kind, unpacked or packed to one of several widths."""
        weight = max(len(request.objective.directions) for request in requests)
        unpacked = [self.unpacked(prompt) for prompt in prompts]
        max_tokens = self.max_tokens
        if self.accumulate > 1:
            least = -(-len(prompts) // self.accumulate) * weight * max(row.width * row.n_rows for row in unpacked)
            max_tokens = least if max_tokens is None else min(max_tokens, least)
        candidates = [unpacked]
        if self.packs:
            packed = [self.packed(prompts, columns) for columns in COLUMNS]
            fits = [max_tokens is None or weight * max(row.width for row in rows) <= max_tokens for rows in packed]
            candidates += [rows for rows, fit in zip(packed, fits, strict=True) if fit]
        pass_cost = self.pass_cost if self.data.pads else 0  # without padding each length needs passes of its own
        best: tuple[float, list[list[PackedRow]]] | None = None
        for rows in candidates:
            indices = plan(
                [row.width for row in rows], weight=weight * rows[0].n_rows, pass_cost=pass_cost,
                max_tokens=max_tokens, at_least=self.accumulate,
            )  # fmt: skip
            made = [[rows[index] for index in sorted(part)] for part in indices]
            cost = sum(self.cost(part, weight) + pass_cost for part in made)
            if best is None or cost < best[0]:
                best = cost, made
        assert best is not None
        return best[1]

    def cost(self, rows: Sequence[PackedRow], weight: int) -> float:
        """The cost of a microbatch, in tokens that pass through the linear layers.

        Attention adds width/(6·hidden size) of their operations, which take about three times as long.
        """
        width = max(row.width for row in rows)
        return len(rows) * rows[0].n_rows * weight * width * (1 + width / (2 * self.hidden_size))

    def unpacked(self, prompt: RequestedPrompt) -> PackedRow:
        """A row of one prompt, or two rows of a prompt with its answers."""
        answers = self.data.long_answers.get(prompt.row)
        if answers is not None:
            return PackedRow((prompt,), len(self.data.prompts[prompt.row]) + answers.longest - 1, n_rows=2)
        return PackedRow((prompt,), min(len(self.data.prompts[prompt.row]), self.region.width))

    def packed(self, prompts: Sequence[RequestedPrompt], columns: int) -> list[PackedRow]:
        """Rows of about this many columns, each with prompts of one request."""
        by_request: dict[int, list[RequestedPrompt]] = {}
        for prompt in prompts:
            by_request.setdefault(prompt.request, []).append(prompt)
        rows = []
        for own in by_request.values():
            for indices in rows_of([self.data.joined(prompt.row) for prompt in own], columns):
                tree = tree_of([one for index in indices for one in self.data.sequences(own[index].row)])
                rows.append(PackedRow(tuple(own[index] for index in indices), tree.width, tree))
        return rows

    def halve(self, microbatches: Sequence[Sequence[PackedRow]], requests: Sequence[FitRequest]) -> int:
        """Bound all further microbatches by half of the largest of these; returns the tokens of that one."""
        largest = max(tokens(rows, requests) for rows in microbatches)
        self.max_tokens = max(largest // 2, 1)
        return largest


def tokens(rows: Sequence[PackedRow], requests: Sequence[FitRequest]) -> int:
    """Number of tokens in a microbatch, including padding."""
    return max(row.width for row in rows) * sum(len(row.directions(requests)) * row.n_rows for row in rows)
