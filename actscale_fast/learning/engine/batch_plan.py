"""How the rows of a step are split into forward passes: little padding, few passes, bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

#: The cost of one more pass, in tokens; less padding than that is cheaper. See benchmarks/README.md; a GPU is bound by
#: launches at such sizes and pads instead (not measured).
PASS_COST_CPU, PASS_COST_GPU = 64, 1 << 30
#: Tokens in one pass on a CPU, where larger products are not faster and larger activations exceed the caches.
PASS_TOKENS_CPU = 1024


def plan(
    lengths: Sequence[int], *, weight: int, pass_cost: int, max_tokens: int | None, at_least: int = 1
) -> list[list[int]]:
    """The items of each pass, by their index in `lengths`.

    Items of one length are kept together if the bound allows it. The sorted lengths are split so that
    Σ (items · weight · longest + pass_cost) is minimal, by dynamic programming over the distinct lengths.

    Args:
        lengths: number of tokens of each item that run.
        weight: number of rows per item (one per direction).
        pass_cost: cost of one more pass, in tokens.
        max_tokens: the largest number of tokens in a pass, including padding; None: no bound. A single item may exceed
            it.
        at_least: number of passes to make; the largest ones are halved until there are as many, or one per item.
    """
    order = sorted(range(len(lengths)), key=lambda item: lengths[item])
    distinct = sorted(set(lengths))
    ends = [sum(length <= bound for length in lengths) for bound in distinct]  # items up to each distinct length
    best: list[tuple[int, int]] = [(0, 0)]  # (cost of the first k distinct lengths, where their last pass starts)
    for k, longest in enumerate(distinct):
        costs = []
        for start in range(k + 1):
            count = ends[k] - (ends[start - 1] if start else 0)
            costs.append((best[start][0] + count * weight * longest + pass_cost, start))
        best.append(min(costs))
    passes: list[list[int]] = []
    k = len(distinct)
    while k:
        start = best[k][1]
        items = order[ends[start - 1] if start else 0 : ends[k - 1]]
        most = len(items) if max_tokens is None else max_tokens // (weight * distinct[k - 1])
        size = even_size(len(items), most)
        passes += [items[first : first + size] for first in range(0, len(items), size)]
        k = start
    passes.reverse()
    while len(passes) < min(at_least, len(lengths)):
        sizes = [len(items) * lengths[items[-1]] if len(items) > 1 else 0 for items in passes]
        largest = sizes.index(max(sizes))
        items = passes[largest]
        passes[largest : largest + 1] = [items[: len(items) // 2], items[len(items) // 2 :]]
    return passes


def even_size(count: int, most: int) -> int:
    """The size of equal pieces of `count` items, with at most `most` (but at least one) in each piece."""
    n_pieces = -(-count // max(most, 1))
    return -(-count // n_pieces)
