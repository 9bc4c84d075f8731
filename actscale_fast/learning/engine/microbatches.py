"""From the prompts of a step to its passes: one by one or packed into rows, whichever is cheapest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..encoded_examples import EncodedExamples
from ..objective import Objective
from .batch_plan import PASS_COST_CPU, PASS_COST_GPU, PASS_TOKENS_CPU, plan
from .extent import Extent
from .packing import COLUMNS, Tree, rows_of, tree_of


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

    def directions(self, shares: Sequence[Share]) -> tuple[int, ...]:
        """The strengths' signs that it runs under."""
        return shares[self.items[0].share].objective.directions


class Arrangement:
    """The passes of a step.

    Args:
        data: the examples.
        extent: what of their prompts runs.
        hidden_size: of the model.
        on_cpu: where it computes.
        accumulate: passes to make, at least; more than one leaves prompts unpacked, so that memory is split.
    """

    def __init__(self, data: EncodedExamples, extent: Extent, hidden_size: int, on_cpu: bool, accumulate: int) -> None:
        self.data, self.extent, self.hidden_size = data, extent, hidden_size
        self.on_cpu, self.accumulate = on_cpu, accumulate
        #: Tokens in one pass, at most; None: no bound.
        self.max_tokens: int | None = PASS_TOKENS_CPU if on_cpu else None
        #: Whether prompts may be packed.
        self.packs = False

    def passes(self, items: Sequence[Item], shares: Sequence[Share]) -> list[list[Unit]]:
        """The cheapest passes of these prompts: one by one, and packed to several widths."""
        if not items:
            return []
        weight = max(len(share.objective.directions) for share in shares)
        single = [self.single(item) for item in items]
        max_tokens = self.max_tokens
        if self.accumulate > 1:
            least = -(-len(items) // self.accumulate) * weight * max(unit.width for unit in single)
            max_tokens = least if max_tokens is None else min(max_tokens, least)
        candidates = [single]
        if self.packs:
            widths = [columns for columns in COLUMNS if max_tokens is None or weight * columns <= max_tokens]
            packed = [self.packed(items, columns) for columns in widths]
            candidates += [
                units
                for units in packed
                if max_tokens is None or weight * max(unit.width for unit in units) <= max_tokens
            ]
        pass_cost = PASS_COST_CPU if self.on_cpu else PASS_COST_GPU
        if not self.data.pads:
            pass_cost = 0  # then every length has passes of its own
        best: tuple[float, list[list[Unit]]] | None = None
        for units in candidates:
            places = plan(
                [unit.width for unit in units], weight=weight, pass_cost=pass_cost, max_tokens=max_tokens,
                at_least=self.accumulate,
            )  # fmt: skip
            passes = [[units[place] for place in sorted(some)] for some in places]
            cost = sum(self.cost(part, weight) + pass_cost for part in passes)
            if best is None or cost < best[0]:
                best = cost, passes
        assert best is not None
        return best[1]

    def cost(self, part: Sequence[Unit], weight: int) -> float:
        """Of a pass, in tokens of the linear layers.

        Attention adds a share that grows with the columns: width/(6·hidden size) of their operations, and some three
        times that in time.
        """
        width = max(unit.width for unit in part)
        return len(part) * weight * width * (1 + width / (2 * self.hidden_size))

    def single(self, item: Item) -> Unit:
        """A prompt that stands by itself."""
        return Unit((item,), min(len(self.data.prompts[item.row]), self.extent.width))

    def packed(self, items: Sequence[Item], columns: int) -> list[Unit]:
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

    def halve(self, passes: Sequence[Sequence[Unit]], shares: Sequence[Share]) -> int:
        """Bound all further passes by half of the largest one; its tokens."""
        largest = max(tokens(part, shares) for part in passes)
        self.max_tokens = max(largest // 2, 1)
        return largest


def tokens(part: Sequence[Unit], shares: Sequence[Share]) -> int:
    """Tokens of one pass, padding included."""
    return max(unit.width for unit in part) * sum(len(unit.directions(shares)) for unit in part)


def may_pack(config: Any, longest: int) -> bool:
    """Whether attention takes a mask of one's own, and no window of it is narrower than a row may be.

    A window that is counted in columns would cut a prompt off from its own beginning in a row of several prompts.
    """
    windows = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_window")]
    widest = longest + max(COLUMNS)
    narrow = any(isinstance(window, int) and window < widest for window in windows)
    if getattr(config, "alibi", False):  # its biases are made from a mask of tokens
        return False
    return config._attn_implementation in ("sdpa", "eager") and not narrow
