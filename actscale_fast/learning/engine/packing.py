"""Packing several prompts into one row: there is no padding between them, and a common beginning runs once.

The prompts of a row are the paths of a tree of tokens, in which a common beginning is one path. A token attends only to
its ancestors, and their number is its position, so every prompt is computed as if it stood alone. If all tokens are
steered by the same scalars this is exact, because the common beginning of two prompts is the same computation. The cost
of attention grows with the square of the row's columns, which limits how much a row should hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Numbers of columns that rows are filled up to; each step tries all of them and takes the cheapest.
COLUMNS = (48, 80, 128)


@dataclass(frozen=True, slots=True)
class Tree:
    """The tokens of one row; parents come before their children."""

    tokens: list[int]
    depths: list[int]  # position of each token, in every prompt that it is part of
    paths: list[list[int]]  # columns of each prompt's tokens
    sources: list[tuple[int, int]]  # for each token: a prompt that it is part of, and its position there

    @property
    def width(self) -> int:
        """Number of columns."""
        return len(self.tokens)

    def allowed(self, width: int) -> Tensor:
        """Which columns each column attends to, bool [width, width]; columns after the tree attend to themselves."""
        seen = torch.eye(width, dtype=torch.bool, device="cpu")
        for path in self.paths:
            columns = torch.tensor(path, device="cpu")
            seen[columns[:, None], columns] = torch.ones(len(path), len(path), dtype=torch.bool, device="cpu").tril()
        return seen


def tree_of(prompts: Sequence[Sequence[int]]) -> Tree:
    """The tree of prompts, which must be in lexicographic order, where neighbours share the most."""
    tree = Tree([], [], [], [])
    before: Sequence[int] = ()
    path: list[int] = []
    for number, prompt in enumerate(prompts):
        shared = _shared(before, prompt)
        path = path[:shared]
        for position in range(shared, len(prompt)):
            path.append(len(tree.tokens))
            tree.tokens.append(prompt[position])
            tree.depths.append(position)
            tree.sources.append((number, position))
        tree.paths.append(list(path))
        before = prompt
    return tree


def rows_of(prompts: Sequence[Sequence[int]], columns: int) -> list[list[int]]:
    """The prompts of each row, by index: no more rows than `columns` requires, with the widest as narrow as possible.

    Rows are consecutive pieces of the lexicographic order, which keeps common beginnings together.
    """
    order = sorted(range(len(prompts)), key=lambda place: tuple(prompts[place]))
    pairs = itertools.pairwise(order)
    added = [len(prompts[order[0]]), *(len(prompts[b]) - _shared(prompts[a], prompts[b]) for a, b in pairs)]
    n_rows = -(-sum(added) // columns)
    low, high = max(len(prompt) for prompt in prompts), sum(map(len, prompts))
    while low < high:  # find the narrowest bound that needs no more rows
        middle = (low + high) // 2
        if len(_filled(prompts, order, added, middle)) <= n_rows:
            high = middle
        else:
            low = middle + 1
    return _filled(prompts, order, added, low)


def _filled(prompts: Sequence[Sequence[int]], order: list[int], added: list[int], bound: int) -> list[list[int]]:
    """Rows of at most `bound` columns, filled one after another."""
    rows: list[list[int]] = []
    held = 0
    for place, more in zip(order, added, strict=True):
        if rows and held + more <= bound:
            rows[-1].append(place)
            held += more
        else:
            rows.append([place])
            held = len(prompts[place])
    return rows


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive attention mask: 0 where attention is allowed, a very negative number elsewhere."""
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, lowest)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that two prompts have in common at their beginning."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
