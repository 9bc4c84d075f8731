"""Several prompts in one row of a pass: no padding between them, and what they begin with in common runs once.

The prompts of a row are the paths of a tree of tokens, in which a common beginning is one path. A token attends to its
ancestors alone and has their number as its position, so that every prompt is computed as if it stood by itself. Where
every token is steered alike, and by the same scalars, that is exact: the beginning of two prompts is the same
computation. Attention then costs the square of the row's columns, which bounds how much a row should hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Columns that rows are filled up to; the plan of a step tries each and takes the cheapest.
COLUMNS = (48, 80, 128)


@dataclass(frozen=True, slots=True)
class Tree:
    """The tokens of one row, parents before children."""

    tokens: list[int]
    depths: list[int]  # of each token, its position in every prompt that it is part of
    paths: list[list[int]]  # the columns of each prompt's tokens
    sources: list[tuple[int, int]]  # of each token: a prompt that it is part of, and its position there

    @property
    def width(self) -> int:
        """Columns."""
        return len(self.tokens)

    def allowed(self, width: int) -> Tensor:
        """Which columns each column attends to, bool [width, width]; columns after the tree see themselves."""
        seen = torch.eye(width, dtype=torch.bool, device="cpu")
        for path in self.paths:
            columns = torch.tensor(path, device="cpu")
            seen[columns[:, None], columns] = torch.ones(len(path), len(path), dtype=torch.bool, device="cpu").tril()
        return seen


def tree_of(prompts: Sequence[Sequence[int]]) -> Tree:
    """The tree of prompts in lexicographic order: neighbours share the most."""
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
    """The prompts of each row, by their place: as many rows as `columns` asks for, the widest as narrow as can be.

    Rows are consecutive pieces of the lexicographic order, which keeps together what begins alike.
    """
    order = sorted(range(len(prompts)), key=lambda place: tuple(prompts[place]))
    pairs = itertools.pairwise(order)
    added = [len(prompts[order[0]]), *(len(prompts[b]) - _shared(prompts[a], prompts[b]) for a, b in pairs)]
    n_rows = -(-sum(added) // columns)
    low, high = max(len(prompt) for prompt in prompts), sum(map(len, prompts))
    while low < high:  # the narrowest bound that needs no more rows
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
    """A mask of attention as models take it in four dimensions: 0 where allowed, very negative elsewhere."""
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, lowest)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that two prompts begin with in common."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
